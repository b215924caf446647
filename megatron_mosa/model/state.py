"""The tensors of a model that checkpoints store: parameters, and what heads select by besides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mosa.attention import selection_buffers
from megatron_mosa.parallel import Partition, partition_of


class StoredTensor(NamedTuple):
    """A tensor that checkpoints store."""

    tensor: Tensor
    """This tensor-parallel rank's part; of a parameter under ZeRO-3, what this rank holds of that part."""

    partition: Partition | None
    """How it is split over the tensor-parallel group; None if it is replicated."""

    is_trained: bool
    """Whether the optimizer steps it and keeps its moments."""

    @property
    def size(self) -> int:
        """Number of elements of this tensor-parallel rank's part."""
        return getattr(self.tensor, "ds_numel", self.tensor.numel())


def stored_tensors(model: torch.nn.Module) -> dict[str, StoredTensor]:
    """Return the stored tensors by Megatron's names, parameters first."""
    parameters = {name: StoredTensor(p, partition_of(p), True) for name, p in model.named_parameters()}
    over_heads = Partition(dim=0)
    return parameters | {name: StoredTensor(b, over_heads, False) for name, b in selection_buffers(model).items()}
