"""``mosa sweep --slurm`` on a real Slurm cluster."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.killer import write_killer
from tests.loaded import loaded_python
from tests.slurm.conftest import CONFIG, ROOT, Jobs

LAYOUTS = ("tp=1,zero=1,micro=2", "tp=2,sp=true,zero=1,micro=2")


def start(jobs: Jobs, output: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [loaded_python(), "-m", "megatron_mosa", "sweep", CONFIG, *jobs.overrides, "--slurm", *arguments]
    command += ["--steps", "2", "--warmup", "1", "--output", str(output)]
    command += [word for layout in LAYOUTS for word in ("--layout", layout)]
    environment = {**jobs.cluster.environment, **jobs.environment(**variables)}
    return subprocess.Popen(
        command, cwd=jobs.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def rows(output: Path) -> dict[tuple[str, str], str]:
    with (output / "results.csv").open() as file:
        return {(row["processes"], row["tp"]): row["status"] for row in csv.DictReader(file)}


def explain(output: Path) -> str:
    return "".join(f"\n== {log}\n{log.read_text()[-3000:]}" for log in sorted((output / "logs").glob("*")))


def test_jobs_are_submitted_waited_for_and_collected(training: Jobs) -> None:
    jobs, output = training, training.folder / "a sweep"  # with a space in all paths
    first = start(jobs, output, "--gpus-per-node", "0", "--processes", "1,2")
    lines: list[str] = []
    assert first.stdout is not None
    for line in first.stdout:
        lines.append(line)
        if line.count("job ") and len([text for text in lines if text.startswith("job ")]) == 2:
            break
    first.send_signal(signal.SIGINT)  # the jobs go on
    errors = first.communicate(timeout=120)[1]
    assert first.returncode == 1 and "stopped waiting; the jobs go on" in errors, "".join(lines) + errors

    again = start(jobs, output, "--gpus-per-node", "0", "--processes", "1,2")
    printed, errors = again.communicate(timeout=400)
    assert again.returncode == 0, printed + errors + explain(output)
    submitted = [line for line in printed.splitlines() if line.startswith("job ") and "of an earlier call" not in line]
    assert not submitted, printed
    assert rows(output) == {("1", "1"): "reference", ("2", "1"): "ok", ("2", "2"): "ok"}
    assert len(list((output / "logs").glob("slurm-*.out"))) == 2

    more = start(jobs, output, "--gpus-per-node", "0", "--processes", "2", "--job-per-layout", "--force")
    printed, errors = more.communicate(timeout=400)
    assert more.returncode == 0, printed + errors + explain(output)
    assert printed.count(": 1 layout on") == 3
    assert rows(output) == {("1", "1"): "reference", ("2", "1"): "ok", ("2", "2"): "ok"}


def test_a_killed_task_costs_only_its_own_layout(training: Jobs) -> None:
    jobs, output = training, training.folder / "sweep-killed"
    killer = write_killer(jobs.folder / "killer", "tp2-sp-zero1-micro2-processes2-batch4")
    options = ["--gpus-per-node", "0", "--processes", "2", "--layout", "tp=2,sp=false,zero=1,micro=2"]
    done = start(jobs, output, *options, PYTHONPATH=f"{killer}:{ROOT}")
    printed, errors = done.communicate(timeout=400)
    assert done.returncode == 0, printed + errors + explain(output)
    with (output / "results.csv").open() as file:
        found = {(row["tp"], row["sp"], row["processes"]): row for row in csv.DictReader(file)}
    reason = found["2", "True", "2"]["reason"]
    assert reason.startswith("a rank was killed by SIGKILL, often for lack of memory; see logs/"), explain(output)
    assert f"failed: {reason}" in printed
    assert [row["status"] for row in found.values()] == ["reference", "ok", "ok", "failed"]
    assert printed.count("starting") > 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--gpus-per-node", "2"],
            2,
            "error: partition main has no GPUs, but --gpus-per-node=2; give --gpus-per-node 0",
        ),
        (
            ["--gpus-per-node", "0", "--partition", "none"],
            2,
            "error: --partition=none does not exist; this cluster has",
        ),
        (["--gpus-per-node", "0", "--sbatch-argument=--nodelist=n9"], 1, "error: sbatch refused the job: "),
    ],
)
def test_mistakes_are_one_line(training: Jobs, arguments: list[str], code: int, message: str) -> None:
    output = training.folder / f"sweep-mistakes-{os.getpid()}-{code}-{len(message)}"
    done = start(training, output, *arguments, "--processes", "2")
    printed, errors = done.communicate(timeout=240)
    assert done.returncode == code, printed + errors
    assert errors.startswith(message) and errors.count("\n") == 1, errors
