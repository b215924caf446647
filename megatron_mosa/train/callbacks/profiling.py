"""Traces and memory snapshots of chosen steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_mosa.parallel import Layout
from megatron_mosa.train.trainer import Callback, Trainer
from megatron_mosa.train.writers import Writers
from megatron_mosa.utils import naming, tolerating

_NO_PROFILE = "a profile is missing"
ALLOCATIONS = 200_000  # the last ones, that a snapshot holds


class Profiling(Callback):
    """Writes what torch's profiler records of the steps and ranks in ``train.profile_steps`` and ``profile_ranks``.

    ``profile/step-NNNNNNNN-rank-N.json.gz`` is a trace, and on a GPU ``.pickle`` a snapshot of its memory.
    """

    def __init__(self, writers: Writers, directory: Path) -> None:
        self.writers = writers
        self.directory = directory / "profile"

    def on_start(self, trainer: Trainer) -> None:
        """Name the steps that this start does not take."""
        first, last = trainer.state.step + 1, trainer.last_step
        if missed := [step for step in trainer.config.train.profile_steps if not first <= step <= last]:
            self.writers.note(
                f"train.profile_steps={missed} are not profiled: this start takes steps {first} to {last}"
            )

    @contextmanager
    def around_step(self, trainer: Trainer, step: int) -> Iterator[None]:
        """Record the step if it is one of those."""
        train = trainer.config.train
        if step not in train.profile_steps or trainer.layout.rank not in train.profile_ranks:
            yield
            return
        path = self.directory / f"step-{step:08d}-rank-{trainer.layout.rank}"
        with (
            _memory_snapshot(path.with_suffix(".pickle"), trainer.layout),
            profile(activities=_activities()) as recorded,
        ):
            yield
        trace = path.with_suffix(".json.gz")
        with tolerating(_NO_PROFILE), naming(trace):
            self.directory.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(trace))
            self.writers.note(f"profile of step {step}: {trace}")


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]


@contextmanager
def _memory_snapshot(path: Path, layout: Layout) -> Iterator[None]:
    """Record allocations on a GPU, with the stacks they came from."""
    if layout.device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
    try:
        yield
        with tolerating(_NO_PROFILE), naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
