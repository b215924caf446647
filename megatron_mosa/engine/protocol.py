"""What the training loop and the checkpoints need of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""tokens, labels (int64), loss_mask (fp32), and document_starts (int64) where attention stays inside documents; each
[micro-batch, T]."""

CopyToHost = Callable[[str, Tensor], Tensor]
"""A copy in host memory, fp32, of the tensor of that key. One from a GPU may be under way until its stream is done."""


def to_host(key: str, tensor: Tensor) -> Tensor:
    """A copy in memory of its own."""
    return tensor.to("cpu", torch.float32, copy=True)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step says of itself."""

    loss: float
    """Mean cross entropy in nats over the counted tokens of the global batch."""

    grad_norm: float
    """Global norm before clipping."""

    skipped_by_config: bool = False
    """The step was left out because the configuration says so: nothing was computed."""

    is_empty: bool = False
    """The loss mask of the whole global batch is zero, so the loss is undefined and the engine has skipped the step."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and norm are finite; if not, the engine has skipped the step. The same on every rank."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class TrainingEngine(Protocol):
    """A model with its optimizer, spread over ranks in some way."""

    accumulation_steps: int

    @property
    def module(self) -> torch.nn.Module:
        """The model."""
        ...

    def train_step(self, batches: Iterable[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over ``accumulation_steps`` micro-batches, on the mean loss of all counted tokens."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss in nats per token."""
        ...

    def optimizer_step(self) -> int:
        """How many times the optimizer has stepped."""
        ...

    def state(self, names: Collection[str] | None = None, copy: CopyToHost = to_host) -> dict[str, Tensor]:
        """Master weights and moments of some or all parameters, whole over data-parallel ranks."""
        ...

    def load_state(self, state: dict[str, Tensor], optimizer_step: int) -> None:
        """Take over what ``state`` returned."""
        ...

    def destroy(self) -> None:
        """Release what the engine holds."""
        ...
