"""launch/slurm/pretrain.sbatch by bash with stubs of Slurm's programs: what a real Slurm does only on bad days."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "pretrain.sbatch"
# Each program takes the first line of a file with its name, if there is one, as what to do instead of its body.
STUB = """#!/bin/bash
echo "{name} $*" >> calls
if [[ -s {name}.next ]]; then next=$(head -n 1 {name}.next); sed -i 1d {name}.next; eval "$next"; fi
{body}
"""
AWAY = 'echo "Unable to contact slurm controller" >&2; exit 1'
PROGRAMS = {
    "python": """case $2 in
    *.begin) printf '%s\\n' "$PWD/run" go ;;
    *.verdict) printf '%s\\n' done 0 ;;
esac""",
    "srun": "",
    "sleep": "",
    "getent": "",
    "sinfo": "echo allocated",
    "scontrol": """case "$1 $2" in
    "show job") echo "JobId=7 JobName=x JobState=RUNNING EndTime=$(date -d '+5 hours' +%FT%T) x=y" ;;
    "show hostnames") echo localhost ;;
esac""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    for name, body in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(STUB.format(name=name, body=body))
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "pretrain_mosa.py").touch()
    return tmp_path


def run_job(folder: Path, **variables: str) -> tuple[int, str, list[str]]:
    """Run the script; return its exit code, what it printed and the calls of programs."""
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "x", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_ON_NODE": "2"}
    environment |= {"SLURM_SUBMIT_DIR": str(folder), "MOSA_PREFLIGHT": "0"} | variables
    done = subprocess.run(
        ["bash", SCRIPT, "config.yaml"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    calls = folder / "calls"
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []


def once(folder: Path, name: str, *lines: str) -> None:
    """Have the next calls of a program do these lines; an empty one changes nothing."""
    (folder / f"{name}.next").write_text("".join(f"{line or ':'}\n" for line in lines))


# The first call of each: begin and `show hostnames`.
AGAIN = ["", "printf '%s\\n' 'again 10 a crash' 1; exit"]


@pytest.mark.parametrize("away", ["scontrol", "sinfo"])
def test_a_controller_that_is_away_is_asked_again(folder: Path, away: str) -> None:
    once(folder, "python", *AGAIN)
    once(folder, away, *[""] * (away == "scontrol"), AWAY, AWAY)
    code, text, calls = run_job(folder)
    assert code == 0 and "the run is done" in text and " left, its nodes are allocated" in text, text
    assert [call for call in calls if call.startswith("sleep")] == ["sleep 1", "sleep 2", "sleep 10"]
    assert sum(call.startswith("srun") for call in calls) == 2


def test_a_controller_that_stays_away_ends_the_job(folder: Path) -> None:
    once(folder, "python", *AGAIN)
    once(folder, "scontrol", "", *[AWAY] * 100)
    code, text, calls = run_job(folder)
    assert code == 1 and "Slurm's controller does not answer; submit again to continue" in text, text
    assert 600 <= sum(int(call.split()[1]) for call in calls if call.startswith("sleep")) / 2 <= 660


@pytest.mark.parametrize(
    ("answers", "code", "message"),
    [
        ([AWAY], 0, "requeued: StartTime=now+30"),
        ([AWAY, "", AWAY], 1, "this cluster does not requeue jobs"),
    ],
)
def test_a_stop_before_the_time_limit_is_requeued(folder: Path, answers: list[str], code: int, message: str) -> None:
    once(folder, "python", "", "printf '%s\\n' 'requeue 30 the time limit is near' 1; exit")
    once(folder, "scontrol", "", "", *answers)  # show hostnames, show job, requeue
    found, text, calls = run_job(folder)
    assert found == code and message in text and "again in another job: the time limit is near" in text, text
    assert not any(call.startswith("sinfo") for call in calls)


@pytest.mark.parametrize("value", ["10m", "0900", "abc", "-1"])
def test_the_least_time_of_a_restart_is_checked(folder: Path, value: str) -> None:
    code, text, calls = run_job(folder, MOSA_MIN_SECONDS=value)
    assert (code, calls) == (2, [])
    assert text == (
        f"error: MOSA_MIN_SECONDS must be a whole number of seconds, got '{value}'; unset it for the default of 600\n"
    )
