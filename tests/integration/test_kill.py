"""kill -9 while a checkpoint is saved: nothing that was published is lost, and the run goes on as if undisturbed."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

from tests.integration.test_pretrain import Runner
from tests.integration.test_pretrain import runner as runner  # a fixture

KILLS = 20
STEPS = 160  # more than the kills leave time for
LONGEST_SAVE = 0.1  # seconds; of this model, whose saves take 0.04 to 0.07 on an idle machine


class Killable:
    """Runs of one process each."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def start(self, name: str) -> int:
        """Start or go on; the process id."""
        overrides = [
            *self.runner.overrides, f"run.name={name}", f"train.steps={STEPS}", "checkpoint.interval=2",
            "validation.interval=1000", "train.global_batch_size=2", "parallel.tensor_model_parallel_size=1",
            "logging.tensorboard=false",
        ]  # fmt: skip
        log = self.runner.folder / f"{name}.log"
        (child,) = self.runner.forked.start([self.runner.config, *overrides], 1, log, log)
        return child

    def exit_code(self) -> int:
        """Of the run that was started last."""
        return self.runner.forked.exit_codes()[0]

    def finish(self, name: str) -> None:
        """Start or go on, to the end."""
        self.start(name)
        assert self.exit_code() == 0, (self.runner.folder / f"{name}.log").read_text()[-3000:]


def published(checkpoints: Path) -> int:
    """The newest step under its final name; 0 if there is none."""
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)


def wait_for_a_save(checkpoints: Path, since: int) -> None:
    """Until a save has begun after a time in nanoseconds; what a kill left behind is older."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for folder in checkpoints.glob(".writing-*"):
            with suppress(FileNotFoundError):  # published meanwhile
                if folder.stat().st_ctime_ns > since:
                    return
        time.sleep(0.001)
    raise TimeoutError(f"no save began in {checkpoints}")


def test_kills_at_random_moments_of_a_save_lose_nothing(runner: Runner) -> None:
    runs = Killable(runner)
    runs.finish("undisturbed")
    checkpoints = runner.folder / "runs" / "killed" / "checkpoints"
    moments = random.Random(0)
    half_written, kept = 0, []
    for _ in range(KILLS):
        started = time.time_ns()
        child = runs.start("killed")
        wait_for_a_save(checkpoints, started)
        time.sleep(moments.uniform(0, LONGEST_SAVE))
        before = published(checkpoints)
        os.kill(child, signal.SIGKILL)
        assert runs.exit_code() == -signal.SIGKILL
        assert published(checkpoints) >= before
        kept.append(published(checkpoints))
        half_written += bool(list(checkpoints.glob(".writing-*")))
    assert half_written >= KILLS // 4  # else the moments were none of a save
    runs.finish("killed")
    log = (runner.folder / "killed.log").read_text()
    assert [int(step) for step in re.findall(r"resumed from \S*step-(\d+)", log)] == [step for step in kept if step]
    assert "damaged" not in log
    assert runner.losses("killed") == runner.losses("undisturbed")
    assert not list(checkpoints.glob(".writing-*"))
