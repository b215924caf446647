"""The interface of an engine to the training loop and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""tokens and labels (int64), loss_mask (fp32), and document_starts (int64) if attention stays within documents; each
[micro-batch, T]."""

CopyToHost = Callable[[str, Tensor], Tensor]
"""Copies the tensor of a key to host memory in fp32. A copy from a GPU is complete once its stream is synchronized."""


def to_host(key: str, tensor: Tensor) -> Tensor:
    """Return a copy that shares no memory with the tensor."""
    return tensor.to("cpu", torch.float32, copy=True)


@dataclass(frozen=True)
class StepResult:
    """The outcome of one optimizer step."""

    loss: float
    """Mean cross entropy in nats over the counted tokens of the global batch."""

    grad_norm: float
    """Global norm before clipping."""

    skipped_by_config: bool = False
    """Whether the configuration skips this step, so that nothing was computed."""

    is_empty: bool = False
    """The loss mask of the whole global batch is zero, so the loss is undefined and the engine has skipped the step."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and norm are finite; if not, the engine has skipped the step. The same on every rank."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class TrainingEngine(Protocol):
    """A model with its optimizer, distributed over ranks."""

    accumulation_steps: int
    """Micro-batches of a step on this rank."""

    @property
    def module(self) -> torch.nn.Module:
        """The model."""
        ...

    def train_step(self, batches: Iterable[Batch], learning_rate: float) -> StepResult:
        """Take one optimizer step over ``accumulation_steps`` micro-batches, on the mean loss of all counted tokens."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss in nats per token."""
        ...

    def optimizer_step(self) -> int:
        """Return the number of optimizer steps taken."""
        ...

    def state(self, names: Collection[str] | None = None, copy: CopyToHost = to_host) -> dict[str, Tensor]:
        """Return master weights and moments of some or all parameters, gathered over data-parallel ranks."""
        ...

    def load_state(self, state: dict[str, Tensor], optimizer_step: int) -> None:
        """Load what ``state`` returned."""
        ...

    def destroy(self) -> None:
        """Release the engine's resources."""
        ...
