"""What the kernels share: the product on tensor cores, tile sizes, where the rows of a head lie.

A *row* of head e is one of its R = B * k slots: r = b * k + slot, in the order of sequences and then of positions. The
token of a row is ``indices[b, e, slot]``; T there marks an empty slot, which takes no part in anything.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def dot(a, b, accumulator, INTERPRETED: tl.constexpr):
    """accumulator + a @ b in fp32: exact products of halves, IEEE products of fp32."""
    if INTERPRETED:  # the interpreter's product of bf16 is wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def tokens_of_rows(indices, head, rows, in_range, E, K, T):
    """Sequence, token and presence of the rows of a head."""
    batch = rows // K
    slot = rows % K
    offsets = (batch.to(tl.int64) * E + head) * K + slot
    tokens = tl.load(indices + offsets, mask=in_range, other=T)
    return batch, tokens, tokens < T


def power_of_2(size: int, least: int = 16) -> int:
    """The smallest power of 2 that holds ``size``; tensor cores want 16 at least."""
    return max(least, 1 << (size - 1).bit_length())


def strides(states: Tensor) -> tuple[int, int]:
    """Of the sequence and of the token in [B, T, h] whose last dimension is contiguous."""
    return states.stride(0), states.stride(1)


def with_contiguous_rows(states: Tensor) -> Tensor:
    """The tensor itself if the last dimension is contiguous, else a copy."""
    return states if states.stride(-1) == 1 else states.contiguous()


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; Hopper's where there is no GPU (interpreter, compiling for another machine)."""
    if device.type != "cuda":
        return 232_448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
