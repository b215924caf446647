"""Checkpoints, every ``checkpoint.interval`` and ``permanent_interval`` steps and at the end."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from megatron_mosa import __version__
from megatron_mosa.checkpoint import CheckpointStore, Metadata
from megatron_mosa.config import config_to_dict
from megatron_mosa.engine import StepResult
from megatron_mosa.errors import StorageError
from megatron_mosa.train.callbacks.base import Callback, is_due
from megatron_mosa.train.trainer import Trainer
from megatron_mosa.train.writers import Writers


class Checkpointing(Callback):
    """Publishes a checkpoint when it is due."""

    def __init__(self, writers: Writers, store: CheckpointStore, data: dict[str, Any]) -> None:
        self.writers = writers
        self.store = store
        self.data = data

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save if it is time."""
        step = trainer.state.step
        if not is_due(trainer, trainer.config.checkpoint.interval, step) and not self.store.is_permanent(step):
            return
        if not result.is_finite:
            self.writers.note("no checkpoint: the last step was not finite")
            return
        metadata = Metadata(
            step=step,
            consumed_samples=trainer.state.consumed_samples,
            optimizer_step=trainer.engine.optimizer_step(),
            config=config_to_dict(trainer.config),
            data=self.data,
            versions={"megatron_mosa": __version__}
            | {name: version(name) for name in ("torch", "megatron-core", "deepspeed")},
            layout={
                "tensor_parallel_size": trainer.layout.tensor_parallel_size,
                "data_parallel_size": trainer.layout.data_parallel_size,
            },
        )
        try:
            path = self.store.save(trainer.engine, metadata)
        except StorageError as error:
            what = f"no checkpoint of step {metadata.step}: '{self.store.folder}' did not take it: {error}"
            if trainer.state.step >= trainer.last_step:
                raise StorageError(f"{what}; make room and start the run again") from None
            self.writers.note(f"{what}; the run goes on")
        else:
            self.writers.note(f"checkpoint {path}")
