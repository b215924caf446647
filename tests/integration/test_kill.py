"""kill -9 during a save: no published checkpoint is lost, and the run resumes as if it had not been interrupted."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.integration.conftest import Runner
from tests.loaded import wait_for_ranks

KILLS = 8
STEPS = 80  # more than the run reaches between the kills
LONGEST_SAVE = 0.1  # seconds; saves of this model take 0.04 to 0.07 s on an idle machine


class KillableRun:
    """Runs of one process each."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.child_file = runner.folder / "child"

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start or resume a run."""
        overrides = [
            f"train.steps={STEPS}", "checkpoint.interval=2", "validation.interval=1000", "train.global_batch_size=2",
            "parallel.tensor_model_parallel_size=1", "logging.tensorboard=false",
        ]  # fmt: skip
        (process,) = self.runner.start(name, *overrides, processes=1, LOADED_PYTHON_CHILD=str(self.child_file))
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the process of the run itself, and wait for its end."""
        os.kill(int(self.child_file.read_text()), signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    def finish(self, name: str) -> None:
        """Start or resume a run, and wait until it is complete."""
        assert wait_for_ranks([self.start(name)]) == [0], self.runner.printed(name, "err")[-3000:]


def published(checkpoints: Path) -> int:
    """Return the newest published step, or 0."""
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)


def wait_for_a_save(checkpoints: Path, since: int) -> None:
    """Wait until a save has started after ``since`` (in nanoseconds); directories of killed saves are older."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for folder in checkpoints.glob(".writing-*"):
            with suppress(FileNotFoundError):  # it was just published
                if folder.stat().st_ctime_ns > since:
                    return
        time.sleep(0.001)
    raise TimeoutError(f"no save started in {checkpoints}")


def test_kills_during_a_save_lose_no_checkpoint(runner: Runner) -> None:
    runs = KillableRun(runner)
    runs.finish("undisturbed")
    checkpoints = runner.folder / "runs" / "killed" / "checkpoints"
    moments = random.Random(0)
    half_written, kept = 0, []
    for _ in range(KILLS):
        started = time.time_ns()
        process = runs.start("killed")
        wait_for_a_save(checkpoints, started)
        time.sleep(moments.uniform(0, LONGEST_SAVE))
        before = published(checkpoints)
        runs.kill(process)
        assert published(checkpoints) >= before
        kept.append(published(checkpoints))
        half_written += bool(list(checkpoints.glob(".writing-*")))
    assert half_written >= KILLS // 4  # otherwise the kills did not hit a save
    runs.finish("killed")
    log = runner.printed("killed", "out")
    assert [int(step) for step in re.findall(r"resumed from \S*step-(\d+)", log)] == [step for step in kept if step]
    assert "damaged" not in log
    assert runner.losses("killed") == runner.losses("undisturbed")
    assert not list(checkpoints.glob(".writing-*"))
