"""Chains of jobs, submitted to a fake sbatch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_mosa.config import config_from_dict
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.slurm.commands import submit
from megatron_mosa.slurm.submit import Request, Submission

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

SBATCH = """#!/bin/sh
echo "$@" >> "$CALLS"
number=$(wc -l < "$CALLS")
[ "$number" -lt "$REFUSED" ] || { echo no such partition >&2; exit 1; }
echo "$((100 + number));cluster"
"""


@pytest.fixture
def submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submission:
    """A chain of three jobs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("REFUSED", "99")
    config = config_from_dict(
        {
            "run": {"name": "run"},
            "model": {"num_layers": 1, "hidden_size": 16},
            "mosa": {"num_heads": 0},
            "data": {"path": "unused", "sequence_length": 8},
            "train": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 4},
        }
    )
    request = Request(nodes=2, tasks_per_node=2, options=("--time=10:00",), chain=3)
    return Submission(config, request, tmp_path / "run" / "submit" / "now", "mosa submit")


def test_each_job_of_a_chain_waits_for_the_previous_one(submission: Submission, tmp_path: Path) -> None:
    assert submission.submit() == ["101", "102", "103"]
    script = str(submission.folder / "job.sbatch")
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable {script}",
        f"--parsable --dependency=afterany:101 {script}",
        f"--parsable --dependency=afterany:102 {script}",
    ]
    assert (submission.folder / "jobs.txt").read_text() == "101\n102\n103\n"
    assert "export MOSA_CHAIN=now\n" in Path(script).read_text()


def test_a_refused_chain_names_the_jobs_already_submitted(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", "3")
    with pytest.raises(RunError, match=r"no such partition; already submitted: 101, 102 \(scancel 101 102\)"):
        submission.submit()


def test_a_batch_that_does_not_fit_all_ranks_is_refused_before_anything_is_written(
    submission: Submission, tmp_path: Path
) -> None:
    """Four nodes of two tasks, two of which share a model: four data-parallel ranks."""
    values = [f"run.directory={tmp_path / 'runs'}", f"data.path={tmp_path / 'none'}", "train.global_batch_size=24"]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        submit(QUICKSTART, [*values, "train.micro_batch_size=5"], nodes=4, tasks_per_node=2)
    product = "train.micro_batch_size=5 x 4 data-parallel ranks = 20"
    fixes = "train.global_batch_size=20, or train.micro_batch_size=3 or 6"
    assert str(caught.value) == f"train.global_batch_size=24 must be divisible by {product}; set {fixes}"
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="data.path=.* does not exist"):  # with such a size, what is next
        submit(QUICKSTART, [*values, "train.micro_batch_size=3"], nodes=4, tasks_per_node=2)
