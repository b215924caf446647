"""Going back to the checkpoint before a loss spike, and past it without its batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_mosa.checkpoint import CheckpointStore, read_metadata
from megatron_mosa.engine import Batch, TrainingEngine
from megatron_mosa.parallel import on_main_rank
from megatron_mosa.train.trainer import TrainingState
from megatron_mosa.train.writers import Writers
from megatron_mosa.utils import write_atomically

SKIPPED = "skip_steps.json"


class Rewinder:
    """Takes a run back; collective."""

    def __init__(
        self,
        directory: Path,
        store: CheckpointStore,
        writers: Writers,
        batches_from: Callable[[TrainingState], Iterator[Batch]],
        allowed: int,
    ) -> None:
        """
        Args:
            directory: of the run; the steps that are left out are kept there, for later starts.
            store, writers: of the run.
            batches_from: this rank's micro-batches from where a run stands.
            allowed: how often to go back in a run's whole life; those before count.
        """
        self.directory = directory
        self.store = store
        self.writers = writers
        self.batches_from = batches_from
        self.allowed = allowed

    def rewind(self, engine: TrainingEngine, spike: int) -> tuple[TrainingState, Iterator[Batch]] | None:
        """Load the newest checkpoint before step ``spike``, which is left out from now on.

        Returns:
            where the run stands now, and its batches; None: there is no such checkpoint, or it was done too often.
        """
        self.store.wait()
        path = on_main_rank(lambda: self._leave_out(spike))
        if path is None:
            return None
        self.store.load(engine, path)
        metadata = read_metadata(path)
        state = TrainingState(metadata.step, metadata.consumed_samples)
        self.writers.rewind(state.step)
        self.writers.note(f"back to {path}; step {spike} will be left out")
        return state, self.batches_from(state)

    def _leave_out(self, spike: int) -> Path | None:
        """Note the step; the checkpoint to go back to. Those of the spike itself, or later, are set aside."""
        steps = skipped_steps(self.directory)
        before = [path for path in self.store.published() if read_metadata(path).step < spike]
        if not before or len(steps) >= self.allowed:
            return None
        for path in self.store.published():
            if path not in before:
                self.store.set_aside(path)
        write_atomically(self.directory / SKIPPED, json.dumps([*steps, spike]) + "\n")
        return before[-1]


def skipped_steps(directory: Path) -> list[int]:
    """Steps that this run has gone back from, and leaves out."""
    path = directory / SKIPPED
    found: Any = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return found
