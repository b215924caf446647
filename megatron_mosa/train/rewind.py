"""Rewinding to the checkpoint before a loss spike, to continue without the batch of the spike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_mosa.checkpoint import CheckpointStore, read_metadata
from megatron_mosa.engine import Batch, TrainingEngine
from megatron_mosa.errors import UserError
from megatron_mosa.parallel import on_main_rank
from megatron_mosa.train.trainer import TrainingState
from megatron_mosa.train.writers import Writers
from megatron_mosa.utils import first_line, load_json, write_atomically

SKIPPED = "skip_steps.json"


class Rewinder:
    """Rewinds a run.

    Args:
        directory: the run directory, where the skipped steps are recorded for later starts.
        batches_from: returns this rank's micro-batches from a state on.
        max_rewinds: rewinds allowed over the whole life of the run, earlier starts included.
    """

    def __init__(
        self,
        directory: Path,
        store: CheckpointStore,
        writers: Writers,
        batches_from: Callable[[TrainingState], Iterator[Batch]],
        max_rewinds: int,
    ) -> None:
        self.directory = directory
        self.store = store
        self.writers = writers
        self.batches_from = batches_from
        self.max_rewinds = max_rewinds

    def rewind(self, engine: TrainingEngine, spike: int) -> tuple[TrainingState, Iterator[Batch]] | None:
        """Load the newest checkpoint before step ``spike``, which is skipped from now on. A collective.

        Returns:
            The state and batches to continue with; None if there is no such checkpoint or no rewind left.
        """
        self.store.wait()
        path = on_main_rank(lambda: self._prepare(spike))
        if path is None:
            return None
        self.store.load(engine, path)
        metadata = read_metadata(path)
        state = TrainingState(metadata.step, metadata.consumed_samples)
        on_main_rank(lambda: self.writers.rewind(state.step))
        self.writers.note(f"rewound to {path}; step {spike} will be skipped")
        return state, self.batches_from(state)

    def _prepare(self, spike: int) -> Path | None:
        """Record the skipped step, set aside the checkpoints after the one to load, and return that."""
        steps = skipped_steps(self.directory)
        newest, damaged = self.store.newest_before(spike)
        for path, damage in damaged:
            self.writers.note(f"checkpoint {path} is damaged: {damage}; an earlier one is taken")
        if newest is None or len(steps) >= self.max_rewinds:
            return None
        published = self.store.published()
        for path in published[published.index(newest) + 1 :]:
            self.store.set_aside(path)
        write_atomically(self.directory / SKIPPED, json.dumps([*steps, spike]) + "\n")
        return newest


def skipped_steps(directory: Path) -> list[int]:
    """Return the steps that earlier rewinds of this run skip.

    Raises:
        UserError: their file is damaged.
    """
    path = directory / SKIPPED
    try:
        found: Any = load_json(path) if path.exists() else []
        return [int(step) for step in found]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"'{path}' is damaged ({first_line(error)}); restore it, or remove it to train on the batches of loss "
            "spikes, too"
        ) from None
