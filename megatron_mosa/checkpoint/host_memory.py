"""Host memory for copies of an engine's state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_MOST = 1 << 28  # numbers in a piece of memory: 1 GiB
_ALIGNED = 16  # numbers: tensors begin at multiples of 64 bytes


class HostMemory:
    """fp32 tensors in host memory, kept from one copy of the same state to the next.

    Where there are GPUs the memory is page-locked: they copy into it at the speed of their bus, and beside each other.
    Such memory is slow to get, and torch rounds every piece of it up to a power of two: hence few large pieces, in
    which tensors lie one after the other.
    """

    def __init__(self) -> None:
        self._places: dict[str, Tensor] = {}
        self._rest = np.empty(0, dtype=np.float32)
        self._size = 0

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Get the memory of tensors, by key and number of elements, that will be copied later."""
        for key, size in sizes.items():
            if key not in self._places:
                self._places[key] = self._place(size)

    def copy(self, key: str, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor to the place that ``key`` has had since it was first heard of.

        A copy from a GPU is done when the current stream is.
        """
        self.reserve({key: tensor.numel()})
        return self._places[key].view(tensor.shape).copy_(tensor, non_blocking=True)

    def _place(self, numbers: int) -> Tensor:
        taken = -(-numbers // _ALIGNED) * _ALIGNED
        if taken > len(self._rest):
            piece = max(taken, min(_MOST, self._size))  # as large as all before: a small model takes little
            self._rest = torch.empty(piece, dtype=torch.float32, pin_memory=torch.cuda.is_available()).numpy()
            self._size += piece
        place, self._rest = self._rest[:numbers], self._rest[taken:]
        return torch.from_numpy(place)  # a storage of its own, which is all that is written of it
