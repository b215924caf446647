"""Saves a checkpoint every ``checkpoint.interval`` and ``permanent_interval`` steps, and at the end."""

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
    """A checkpoint that is being written while training continues."""

    step: int
    copy_seconds: float
    """Time that training waited for the copy to host memory."""
    path: Future[Path]


class Checkpointing(Callback):
    """Starts a save when it is due; with ``checkpoint.asynchronous``, training continues while it is written."""

    def __init__(self, writers: Writers, store: CheckpointStore, data: dict[str, Any]) -> None:
        self.writers = writers
        self.store = store
        self.data = data
        self.saving: _Save | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Prepare host memory for the copies, concurrently with the first steps."""
        if trainer.state.step < trainer.last_step:
            self.store.prepare(trainer.engine)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Report the previous save once it has finished, and start one if it is due."""
        if self.saving is not None and self.saving.path.done():
            self._finish(trainer)
        step = trainer.state.step
        if not trainer.is_due(trainer.config.checkpoint.interval, step) and not self.store.is_permanent(step):
            return
        if not (result.is_finite or result.skipped_by_config or trainer.stop_reason):
            self.writers.note(f"no checkpoint saved: step {step} was not finite")
            return
        self._finish(trainer)  # two saves at a time would hold the state twice in host memory
        started = time.perf_counter()
        path = self.store.begin_save(trainer.engine, self._metadata(trainer))
        self.saving = _Save(step, time.perf_counter() - started, path)
        for callback in trainer.callbacks:
            callback.on_save(trainer)
        if not trainer.config.checkpoint.asynchronous:
            self._finish(trainer)

    def on_end(self, trainer: Trainer) -> None:
        """Wait for the last save."""
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        """Wait for the current save, if there is one, and report its outcome.

        Raises:
            StorageError: the save of the last step failed.
        """
        saving, self.saving = self.saving, None
        if saving is None:
            return
        trainer.services.watchdog.beat(f"waiting for the checkpoint of step {saving.step}")
        started = time.perf_counter()
        try:
            path = saving.path.result()
        except StorageError as error:
            problem = f"could not write the checkpoint of step {saving.step} to '{self.store.folder}': {error}"
            if saving.step >= trainer.last_step:
                fix = f"free some space and start the run again{self._resumes_from()}"
                raise StorageError(f"{problem}; {fix}") from None
            self.writers.note(f"{problem}; training continues")
        else:
            disk_seconds = time.perf_counter() - started
            waited = f"{saving.copy_seconds:.2f} s for the copy to memory, {disk_seconds:.2f} s for the disk"
            self.writers.note(f"saved checkpoint {path} (training waited {waited})")
            trainer.services.status.update("training", checkpoint=path.name, checkpoint_time=time.time())

    def _resumes_from(self) -> str:
        found = self.store.published()
        return f": it resumes from {found[-1]}" if found else ""

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
