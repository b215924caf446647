"""What a model is made of that is learned: its parameters, and the thresholds of its MoSA heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mosa.attention import threshold_buffers
from megatron_mosa.parallel import Partition, partition_of


class Stored(NamedTuple):
    """A tensor that checkpoints keep."""

    tensor: Tensor
    """This tensor-parallel rank's part; under ZeRO-3 of a parameter this rank's share of it."""

    partition: Partition | None
    """How it is split over the tensor-parallel group; None: it is replicated."""

    is_trained: bool
    """Whether an optimizer steps it, and keeps moments of it."""

    @property
    def size(self) -> int:
        """Numbers in this tensor-parallel rank's part."""
        return getattr(self.tensor, "ds_numel", self.tensor.numel())


def stored_tensors(model: torch.nn.Module) -> dict[str, Stored]:
    """By Megatron's names; parameters first."""
    parameters = {name: Stored(p, partition_of(p), True) for name, p in model.named_parameters()}
    of_heads = Partition(dim=0)
    return parameters | {name: Stored(b, of_heads, False) for name, b in threshold_buffers(model).items()}
