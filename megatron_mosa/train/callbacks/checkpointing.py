"""Checkpoints, every ``checkpoint.interval`` and ``permanent_interval`` steps and at the end."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mosa.checkpoint import CheckpointStore, Metadata
from megatron_mosa.config import config_to_dict
from megatron_mosa.engine import StepResult
from megatron_mosa.errors import StorageError
from megatron_mosa.train.trainer import Callback, Trainer
from megatron_mosa.train.writers import Writers
from megatron_mosa.utils import versions


@dataclass(frozen=True)
class _Save:
    """One that goes on beside training."""

    step: int
    copied: float
    """Seconds that training waited for the copy in host memory."""
    outcome: Future[Path]


class Checkpointing(Callback):
    """Begins a checkpoint when it is due; by ``checkpoint.asynchronous`` training goes on while it is written."""

    def __init__(self, writers: Writers, store: CheckpointStore, data: dict[str, Any]) -> None:
        self.writers = writers
        self.store = store
        self.data = data
        self.saving: _Save | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Get ready, beside the first steps."""
        if trainer.state.step < trainer.last_step:
            self.store.prepare(trainer.engine)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save if it is time; say what became of the save before."""
        if self.saving is not None and self.saving.outcome.done():
            self._finish(trainer)
        step = trainer.state.step
        if not trainer.is_due(trainer.config.checkpoint.interval, step) and not self.store.is_permanent(step):
            return
        if not (result.is_finite or result.skipped_by_config or trainer.stopping):
            self.writers.note("no checkpoint: the last step was not finite")
            return
        self._finish(trainer)  # two at a time would be twice the state in host memory
        begun = time.perf_counter()
        outcome = self.store.begin_save(trainer.engine, self._metadata(trainer))
        self.saving = _Save(step, time.perf_counter() - begun, outcome)
        for callback in trainer.callbacks:
            callback.on_save(trainer)
        if not trainer.config.checkpoint.asynchronous:
            self._finish(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Wait for the last."""
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        """Wait for the save that is under way, if any, and say what became of it.

        Raises:
            StorageError: it was the last step's, and failed.
        """
        saving, self.saving = self.saving, None
        if saving is None:
            return
        trainer.survival.watchdog.beat(f"waiting for the checkpoint of step {saving.step}")
        waiting = time.perf_counter()
        try:
            path = saving.outcome.result()
        except StorageError as error:
            what = f"no checkpoint of step {saving.step}: '{self.store.folder}' did not take it: {error}"
            if saving.step >= trainer.last_step:
                raise StorageError(f"{what}; make room and start the run again") from None
            self.writers.note(f"{what}; the run goes on")
        else:
            written = time.perf_counter() - waiting
            waited = f"{saving.copied:.2f} s for the copy in memory, {written:.2f} s for the disk"
            self.writers.note(f"checkpoint {path} (training waited {waited})")
            trainer.survival.status.update("training", checkpoint=path.name, checkpoint_time=time.time())

    def _metadata(self, trainer: Trainer) -> Metadata:
        return Metadata(
            step=trainer.state.step,
            consumed_samples=trainer.state.consumed_samples,
            optimizer_step=trainer.engine.optimizer_step(),
            config=config_to_dict(trainer.config),
            data=self.data,
            versions=versions("torch", "megatron-core", "deepspeed"),
            layout={
                "tensor_parallel_size": trainer.layout.tensor_parallel_size,
                "data_parallel_size": trainer.layout.data_parallel_size,
            },
        )
