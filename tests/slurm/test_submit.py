"""``mosa submit`` on a real Slurm cluster."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.loaded import loaded_python
from tests.slurm.conftest import CONFIG, Jobs


def submit(jobs: Jobs, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [loaded_python(), "-m", "megatron_mosa", "submit", CONFIG, *jobs.overrides, *arguments]
    environment = {**jobs.cluster.environment, **jobs.environment(**variables)}
    return subprocess.run(
        command, cwd=jobs.folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_dry_run_prints_the_job_and_writes_nothing(training: Jobs) -> None:
    jobs = training
    options = ["--nodes=2", "--gpus-per-node=2", "--time=10:00", "--sbatch-argument=--mem=0", "--chain=3", "--dry-run"]
    done = submit(jobs, "run.name=dry", *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    wanted = {"--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=10:00", "--mem=0", "--job-name=dry"}
    assert wanted <= {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    last_option = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last_option])  # sbatch stops at the first command
    assert any(line.startswith("# sbatch --parsable ") for line in lines)
    assert "--dependency=afterany:JOB" in lines[-1]
    assert not jobs.run("dry").exists()


@pytest.mark.parametrize(
    ("arguments", "path", "code", "line"),
    [
        (["--nodes=0"], None, 2, "error: --nodes must be at least 1 and at most 100000, got 0"),
        (["--nodes=3"], None, 2, "error: world size 3 is not divisible by parallel.tensor_model_parallel_size=2"),
        (["--sbatch-argument=x"], None, 2, "error: --sbatch-argument='x' is not an option of sbatch"),
        (["train.stepz=3"], None, 2, "error: "),
        ([], "/none", 1, "error: sbatch is not on PATH"),
        (["--nodes=2", "--partition=none"], None, 1, "error: sbatch refused the job: "),
    ],
)
def test_mistakes_are_one_line(training: Jobs, arguments: list[str], path: str | None, code: int, line: str) -> None:
    jobs = training
    variables = {"PATH": path} if path else {}
    done = submit(jobs, "run.name=mistakes", *arguments, **variables)
    assert done.returncode == code
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1, done.stderr
    assert os.path.exists(jobs.run("mistakes")) == ("--partition=none" in arguments)
