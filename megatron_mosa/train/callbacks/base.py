"""The hooks of the training loop."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from megatron_mosa.engine import StepResult

if TYPE_CHECKING:
    from megatron_mosa.train.trainer import Trainer


class Callback:
    """Does nothing; override what you need. Every hook runs on every rank."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this start."""

    def around_step(self, trainer: Trainer, step: int) -> AbstractContextManager[object]:
        """A context in which step ``step`` is taken."""
        return nullcontext()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After ``trainer.state`` has moved on."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of this start, or at once if there was none to take."""


def is_due(trainer: Trainer, interval: int, step: int) -> bool:
    """Whether something that happens every ``interval`` steps, and at the end of a start, happens at ``step``."""
    return step % interval == 0 or step == trainer.last_step
