"""Manage the host memory that checkpoint snapshots are copied to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_MAX_BLOCK = 1 << 28  # fp32 elements per block of memory: 1 GiB
_ALIGNMENT = 16  # fp32 elements: tensors start at multiples of 64 bytes


class HostMemory:
    """fp32 buffers in host memory, reused from one copy of the same state to the next.

    If there are GPUs the memory is page-locked: GPUs copy into it at bus speed, and in parallel. Page-locked memory is
    slow to allocate, and torch rounds every block up to a power of two: hence few large blocks, each shared by
    consecutive tensors.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._free = np.empty(0, dtype=np.float32)
        self._allocated = 0

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Allocate buffers for later copies; ``sizes`` maps keys to numbers of elements."""
        for key, size in sizes.items():
            if key not in self._buffers:
                self._buffers[key] = self._allocate(size)

    def copy(self, key: str, tensor: Tensor) -> Tensor:
        """Start copying a tensor to the buffer of ``key``, which is allocated on first use.

        A copy from a GPU is complete once the current stream is synchronized.
        """
        self.reserve({key: tensor.numel()})
        return self._buffers[key].view(tensor.shape).copy_(tensor, non_blocking=True)

    def _allocate(self, elements: int) -> Tensor:
        padded = -(-elements // _ALIGNMENT) * _ALIGNMENT
        if padded > len(self._free):
            block = max(padded, min(_MAX_BLOCK, self._allocated))  # doubles the total: a small model needs little
            is_pinned = torch.cuda.is_available()
            self._free = torch.empty(block, dtype=torch.float32, device="cpu", pin_memory=is_pinned).numpy()
            self._allocated += block
        buffer, self._free = self._free[:elements], self._free[padded:]
        return torch.from_numpy(buffer)  # has its own storage, so that saving it writes nothing else
