"""``mosa isoflop run`` as a user runs it: interrupted, gone on with, measured and reported, on the CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import Runner
from tests.loaded import loaded_python

STEPS = 12
PAUSED = 5
MOSA = "mini-code-mosa-rho8-seed{}-lr{}"
DENSE = "mini-code-dense-seed1"


class Grid:
    """A grid of five cells: two learning rates of MoSA, of which the better one is taken for a second seed."""

    def __init__(self, runner: Runner, folder: Path) -> None:
        self.runner, self.folder, self.path = runner, folder, folder / "grid.yaml"
        self.output = folder / "out"

    def write(self, broken: bool, paused: bool) -> None:
        values = [override.split("=", 1) for override in self.runner.overrides]
        own = ("mosa.num_heads", "mosa.sparsity", "run.directory", "data.path")
        overrides: dict[str, Any] = {key: yaml.safe_load(value) for key, value in values if key not in own}
        overrides |= {"train.steps": STEPS, "parallel.tensor_model_parallel_size": 1, "data.num_workers": 0}
        overrides["parallel.sequence_parallel"] = False
        fault = {"fault_injection.fault": "pause", "fault_injection.step": PAUSED, "fault_injection.seconds": 100}
        mosa = {"kind": "expert_choice", "sparsity": 8, "dense_heads": 1, "seeds": [1, 2]}
        mosa |= {"learning_rates": [1e-5, 2e-3], "overrides": fault if paused else {}}
        grid = {
            "name": "trial",
            "base": self.runner.config,
            "overrides": overrides,
            "sizes": {"mini": {"model.num_dense_heads": 3}},
            "corpora": {"code": {"data.path": str(self.runner.folder / "data")}},
            "relative_to": "dense",
            "evaluate": {"samples": 4, "calibration_samples": 4, "decode": [1, 2], "decode_context": 20},
            "members": {
                "dense": {"kind": "dense"},
                "mosa": mosa,
                "apex": {"kind": "dense", "overrides": {"train.apex": "always" if broken else "auto"}},
            },
        }
        self.path.write_text(yaml.safe_dump(grid, sort_keys=False))

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = ["-m", "megatron_mosa", "isoflop", "run", str(self.path), "--output", str(self.output), *options]
        return subprocess.Popen(
            [loaded_python(), *command], cwd=self.folder, env=self.runner.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self, *options: str) -> tuple[int, str, str]:
        process = self.start(*options)
        printed, errors = process.communicate(timeout=240)
        return process.returncode, printed, errors + self.logs()

    def logs(self) -> str:
        return "".join(f"\n== {log.name}\n{log.read_text()[-1500:]}" for log in sorted(self.output.glob("logs/*")))

    def steps(self, cell: str) -> list[int]:
        path = self.output / "runs" / cell / "metrics.jsonl"
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return [line["step"] for line in lines if "loss" in line]

    def rows(self) -> dict[str, dict[str, Any]]:
        lines = (self.output / "results.jsonl").read_text().splitlines()
        return {row["cell"]: row for row in map(json.loads, lines)}


@pytest.fixture
def grid(runner: Runner, tmp_path: Path) -> Grid:
    return Grid(runner, tmp_path)


def test_a_grid_is_interrupted_gone_on_with_measured_and_reported(grid: Grid) -> None:
    grid.write(broken=True, paused=True)
    slow, fast, second = MOSA.format(1, "1e-05"), MOSA.format(1, "0.002"), MOSA.format(2, "0.002")
    first, deadline = grid.start("--jobs", "3"), time.monotonic() + 120
    while not (grid.output / "cells" / f"{DENSE}.json").exists() or any(
        len(grid.steps(cell)) < PAUSED - 1 for cell in (slow, fast)
    ):
        assert time.monotonic() < deadline and first.poll() is None, grid.logs()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    printed, errors = first.communicate(timeout=120)
    assert first.returncode == 1, printed + errors
    assert "stopped with " in errors and "run the same command again to continue" in errors
    assert printed.count("stopped; the same command continues it") == 2, printed + errors + grid.logs()
    done = grid.output / "cells" / f"{DENSE}.json"
    kept = done.stat().st_mtime_ns

    grid.write(broken=True, paused=False)
    code, printed, errors = grid.finish("--jobs", "1")
    assert code == 1, printed + errors
    assert printed.count(", NON-CAUSAL") == 3
    assert "1 of 5 cells failed; mini-code-apex-seed1: exit code 2: train.apex=always needs a GPU" in errors
    assert "[0/5]" not in printed and "5 cells: 1 done, 4 to train" in printed
    assert done.stat().st_mtime_ns == kept
    for cell in (slow, fast, second):
        assert grid.steps(cell) == list(range(1, STEPS + 1)), grid.logs()
    rows = grid.rows()
    assert {cell: row["status"] for cell, row in rows.items()} == {
        DENSE: "done", slow: "done", fast: "done", "mini-code-apex-seed1": "failed", second: "done",
    }  # fmt: skip
    assert rows[fast]["loss"] < rows[slow]["loss"]
    assert [rows[cell]["starts"] for cell in (DENSE, fast, second)] == [1, 2, 1]
    assert [rows[cell]["step_alone"] for cell in (fast, second)] == [False, True]  # at first three ran at once
    assert (rows[DENSE]["causal"], rows[second]["causal"]) == (True, False)
    assert 0.9 < rows[second]["budget_share"] <= 1 == rows[DENSE]["budget_share"]
    assert rows[second]["heads"] > 1 and rows[second]["kv_bytes_8k"] > 0 and rows[second]["peak_memory_gib"] > 0

    grid.write(broken=False, paused=False)  # mended
    code, printed, errors = grid.finish("--measure", "--steps", "2", "--warmup", "1")
    assert code == 0, printed + errors
    rows = grid.rows()
    assert all(row["status"] == "done" and row["step_alone"] and row["step_seconds"] > 0 for row in rows.values())
    assert len(list((grid.output / "timings").glob("*.json"))) == 2  # dense and apex have the same model
    assert all(row["evaluated_loss"] > 0 and row["leak_error"] is not None for row in rows.values())
    assert rows[DENSE]["leak"] == pytest.approx(0, abs=1e-5) and rows[second]["flip_rate"] > 0
    assert rows[DENSE]["decode_ms"].keys() == {"1", "2"} and rows[DENSE]["decode_context"] == 20
    assert rows[second]["causal_loss"] > 0 and "looks ahead" in rows[second]["not_measured"]["decode_ms"]
    assert list(grid.output.glob("runs/*/checkpoints"))

    code, printed, errors = grid.finish("--no-train", "--measure", "--remove-checkpoints")
    assert code == 0 and "measuring" not in printed and "evaluating" not in printed, printed + errors
    assert not list(grid.output.glob("runs/*/checkpoints"))  # of the calls before

    done_again = grid.runner.mosa("report", str(grid.output))
    assert done_again.returncode == 0, done_again.stderr
    text = (grid.output / "report.md").read_text()
    assert "| mosa rho 8 | 1 + " in text and "| **NON-CAUSAL** |" in text and "1e-05: " in text
    for name in ("mini-code.png", "mini-code-losses.png"):
        assert (grid.output / name).stat().st_size > 10_000

    command = rows[second]["command"].split()
    assert command[:2] == ["mosa", "pretrain"]
    again = grid.runner.mosa(*command[1:], "run.name=again")  # the row has all that is needed
    assert again.returncode == 0, again.stderr
    assert f"Validation loss:  {rows[second]['loss']:.4f}" in again.stdout


def test_a_second_call_and_a_limit(grid: Grid) -> None:
    grid.write(broken=False, paused=True)
    first, deadline = grid.start("--time-limit", "100"), time.monotonic() + 120
    while not (grid.output / "logs").exists() or not list(grid.output.glob("logs/*.log")):
        assert time.monotonic() < deadline and first.poll() is None, grid.logs()
        time.sleep(0.05)
    code, _, errors = grid.finish()
    assert code == 2 and "another mosa isoflop run is running in --output=" in errors
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    code, printed, errors = grid.finish("--time-limit", "0.0001")
    assert code == 1 and "out of time with " in errors, printed + errors
