"""Injected faults (section ``fault_injection``)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from megatron_mosa.resilience import FaultInjection
from megatron_mosa.train.trainer import Callback, Trainer


class Faults(Callback):
    """Injects the fault at the step and place that the configuration names. Faults of data are in the batches."""

    def __init__(self, faults: FaultInjection) -> None:
        self.faults = faults

    def around_step(self, trainer: Trainer, step: int) -> AbstractContextManager[object]:
        """Place "step"."""
        if step not in trainer.skip_steps:
            self.faults.inject("step", step)
        return nullcontext()

    def on_validation_batch(self, trainer: Trainer) -> None:
        """Place "validation"."""
        self.faults.inject("validation", trainer.state.step)

    def on_save(self, trainer: Trainer) -> None:
        """Place "save"."""
        self.faults.inject("save", trainer.state.step)
