"""Fault injection (section ``fault_injection``), for tests of recovery."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from megatron_mosa.resilience.faults import FaultInjection
from megatron_mosa.train.trainer import Callback, Trainer


class Faults(Callback):
    """Injects the configured fault at its step and place. Faults in data are injected into the batches instead."""

    def __init__(self, faults: FaultInjection) -> None:
        self.faults = faults

    def around_step(self, trainer: Trainer, step: int) -> AbstractContextManager[object]:
        if step not in trainer.skip_steps:
            self.faults.inject("step", step)
        return nullcontext()

    def on_validation_batch(self, trainer: Trainer) -> None:
        self.faults.inject("validation", trainer.state.step)

    def on_save(self, trainer: Trainer) -> None:
        self.faults.inject("save", trainer.state.step)
