"""``mosa isoflop run --slurm`` on a real Slurm cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import yaml

from tests.loaded import loaded_python
from tests.slurm.conftest import CONFIG, Jobs


def write(jobs: Jobs, path: Path) -> None:
    values = dict(override.split("=", 1) for override in jobs.overrides)
    own = ("mosa.num_heads", "mosa.sparsity", "run.directory", "data.path")
    overrides = {key: yaml.safe_load(value) for key, value in values.items() if key not in own}
    overrides |= {"parallel.tensor_model_parallel_size": 1, "parallel.sequence_parallel": False}
    grid = {
        "name": "trial",
        "base": CONFIG,
        "overrides": overrides,
        "sizes": {"mini": {"model.num_dense_heads": 3}},
        "corpora": {"code": {"data.path": values["data.path"]}},
        "members": {
            "dense": {"kind": "dense", "learning_rates": [0.002, 0.001], "seeds": [1, 2]},
            "mosa": {"kind": "expert_choice", "sparsity": 8, "dense_heads": 1},
        },
    }
    path.write_text(yaml.safe_dump(grid, sort_keys=False))


def start(jobs: Jobs, path: Path, output: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [loaded_python(), "-m", "megatron_mosa", "isoflop", "run", str(path), "--output", str(output)]
    environment = {**jobs.cluster.environment, **jobs.environment()}
    return subprocess.Popen(
        [*command, "--slurm", *arguments],
        cwd=jobs.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def explain(output: Path) -> str:
    return "".join(f"\n== {log}\n{log.read_text()[-3000:]}" for log in sorted((output / "logs").glob("*")))


def test_cells_are_jobs_that_go_on_and_are_collected(training: Jobs) -> None:
    path, output = training.folder / "grid.yaml", training.folder / "grid"
    write(training, path)
    first = start(training, path, output, "--gpus-per-node", "0")
    assert first.stdout is not None
    lines: list[str] = []
    for line in first.stdout:
        lines.append(line)
        if len([text for text in lines if text.startswith("job ")]) == 3:
            break
    first.send_signal(signal.SIGINT)  # the jobs go on
    errors = first.communicate(timeout=120)[1]
    assert first.returncode == 1 and "stopped waiting; the jobs go on" in errors, "".join(lines) + errors

    again = start(training, path, output, "--gpus-per-node", "0")
    printed, errors = again.communicate(timeout=400)
    assert again.returncode == 0, printed + errors + explain(output)
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == 4 * ["done"]  # the second seed's learning rate was known late
    assert len(list((output / "jobs").glob("*.job"))) == 4
    assert all(row["device"] == "Slurm" and not row["step_alone"] for row in rows)


def test_mistakes_are_one_line(training: Jobs) -> None:
    path, output = training.folder / "grid-wrong.yaml", training.folder / f"grid-wrong-{os.getpid()}"
    write(training, path)
    for arguments, code, message in (
        (["--gpus-per-node", "2"], 2, "error: partition main has no GPUs, but --gpus-per-node=2"),
        (["--gpus-per-node", "0", "--measure"], 2, "error: --measure measures on this machine's device"),
        (["--gpus-per-node", "0", "--sbatch-argument=--nodelist=n9"], 1, "error: sbatch refused the job: "),
    ):
        done = start(training, path, output, *arguments)
        printed, errors = done.communicate(timeout=240)
        assert done.returncode == code, printed + errors
        assert errors.startswith(message) and errors.count("\n") == 1, errors
