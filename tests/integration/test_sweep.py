"""``mosa sweep`` as a user runs it: three layouts on two processes, a crashing rank, a repetition and a wrong loss."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.killer import write_killer
from tests.loaded import loaded_python

ROOT = Path(__file__).parents[2]
TINY = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.head_dim=8",
    "mosa.num_heads=4",
    "mosa.sparsity=8",
    "data.sequence_length=64",
    "data.vocab_size=400",
    "data.validation_fraction=0.2",
    "data.num_workers=0",
    "train.steps=20",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "optimizer.warmup_steps=0",
]
GOOD = ["tp=1,zero=2,micro=4", "tp=2,sp=true,zero=1,micro=2"]
DOOMED = "tp=2,sp=false,zero=1,micro=8"


class Sweeper:
    """Runs the command in one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "out"
        self.config = [str(ROOT / "configs" / "quickstart.yaml"), *TINY, f"data.path={folder}/data"]
        self.killer = write_killer(folder / "killer", "tp2-zero1-micro8-processes2-batch8")

    def call(self, *arguments: str, kill: bool = False) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if kill:
            environment["PYTHONPATH"] = str(self.killer)
        return subprocess.run(
            [loaded_python(), "-m", "megatron_mosa", *arguments],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def sweep(
        self, *layouts: str, kill: bool = False, steps: int = 3, processes: str = "2", more: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        options = [word for layout in layouts for word in ("--layout", layout)]
        options += ["--processes", processes, "--steps", str(steps), "--warmup", "1", "--output", str(self.output)]
        return self.call("sweep", *self.config, *options, *more, kill=kill)

    def rows(self) -> list[dict[str, str]]:
        with (self.output / "results.csv").open() as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def sweeper(tmp_path_factory: pytest.TempPathFactory) -> Sweeper:
    folder = tmp_path_factory.mktemp("sweep")
    sweeper = Sweeper(folder)
    library = Path(os.__file__).parent
    names = ("ast.py", "argparse.py", "bdb.py", "calendar.py", "cmd.py", "copy.py", "csv.py", "dis.py", "enum.py")
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": (library / name).read_text()}) + "\n" for name in names))
    done = sweeper.call("data", "build", *sweeper.config, f"data.sources=[{source}]")
    assert done.returncode == 0, done.stderr
    sweeper.config.append(f"data.sources=[{source}]")
    return sweeper


def test_a_sweep_from_start_to_report_and_its_repeat(sweeper: Sweeper) -> None:
    done = sweeper.sweep(GOOD[0], DOOMED, GOOD[1], kill=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference, first, doomed, second = sweeper.rows()
    assert (reference["status"], float(reference["loss_deviation"])) == ("reference", 0.0)
    for row in (first, second):
        assert row["status"] == "ok"
        # If the layers' weights were off by 5 %, the loss would deviate by 2e-4.
        assert float(row["loss_deviation"]) < 1e-5 and float(row["grad_norm_deviation"]) < 1e-4
        assert float(row["tokens_per_second_per_rank"]) > 0 and float(row["peak_memory_gib"]) > 0
        assert 0 < float(row["communication_share"]) < 1 and float(row["strong_efficiency"]) > 0
        assert float(row["ms_collectives"]) > 0 and float(row["ms_computation"]) > 0
        assert row["note"] == "functional, not performance"
    assert doomed["status"] == "failed" and "SIGKILL" in doomed["reason"]
    assert f"{DOOMED} on 2 processes: failed" in done.stdout
    assert f"[2/4] {GOOD[0].replace('zero', 'sp=false,zero')} on 2 processes: measuring, step 1/3" in done.stdout
    assert done.stdout.count("starting 2 processes") == 2  # once more after the failure
    text = (sweeper.output / "results.md").read_text()
    assert "functional, not performance" in text and "failed: a rank was killed by SIGKILL" in text
    for name in ("scaling.png", "breakdown.png"):
        assert (sweeper.output / name).stat().st_size > 1000

    result = sweeper.output / "layouts" / "tp1-zero2-micro4-processes2-batch8.json"
    losses = json.loads(result.read_text())["losses"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    kept = result.stat().st_mtime_ns
    again = sweeper.sweep(*GOOD, DOOMED)  # nothing is killed this time
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("(kept)") == 3
    assert result.stat().st_mtime_ns == kept
    assert [row["status"] for row in sweeper.rows()] == ["reference", "ok", "ok", "ok"]
    assert float(sweeper.rows()[3]["loss_deviation"]) < 1e-5


def test_counts_are_added_later_and_measured_as_far_as_time_permits(sweeper: Sweeper) -> None:
    options = ("--weak", "4", "--reference", "fp32")
    late = sweeper.sweep("tp=1,zero=1,micro=2", processes="1,2", more=(*options, "--time-limit", "0.001"))
    assert late.returncode == 1, late.stdout + late.stderr
    assert "not measured: " in late.stderr and "run the same command again" in late.stderr
    assert [row["status"] for row in sweeper.rows()].count("missing") == 4
    done = sweeper.sweep("tp=1,zero=1,micro=2", processes="1,2", more=options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["label"], row["processes"], row["global_batch"]): row for row in sweeper.rows()}
    label = "tp=1,sp=false,zero=1,micro=2"
    weak, both = rows[label, "1", "4"], rows[label, "2", "8"]
    assert (weak["strong_efficiency"], float(weak["weak_efficiency"])) == ("", 1.0)
    assert float(both["strong_efficiency"]) > 0 and float(both["weak_efficiency"]) > 0
    assert sweeper.rows()[0]["status"] == "reference" and sweeper.rows()[0]["fp32"] == "True"
    assert all(float(row["loss_deviation"]) < 1e-5 for row in rows.values() if row["loss_deviation"])


def test_a_different_request_is_rejected_and_a_wrong_loss_is_an_error(sweeper: Sweeper) -> None:
    other = sweeper.sweep(*GOOD, steps=4)
    assert other.returncode == 2 and "--steps=3, now 4" in other.stderr
    result = sweeper.output / "layouts" / "tp1-zero2-micro4-processes2-batch8.json"
    content = json.loads(result.read_text())
    content["losses"][1] *= 1.002
    result.write_text(json.dumps(content))
    wrong = sweeper.sweep(*GOOD)
    assert wrong.returncode == 1, wrong.stdout + wrong.stderr
    assert "more than 0.001 (fp32): tp=1,sp=false,zero=2,micro=4 on 2 processes (2.0e-03)" in wrong.stderr
