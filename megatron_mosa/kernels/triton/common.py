"""What the kernels share: the product on tensor cores, rotation of rows, the order of programs."""

from __future__ import annotations

import os
from typing import Any

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
def grouped(program, tiles, heads, GROUP):
    """Head and tile of a program, so that GROUP tiles of all heads run before the next tiles do.

    The tokens of these tiles, which all heads gather from, then stay in the L2 cache, and so do a head's weights for
    its GROUP tiles.
    """
    first = program // (GROUP * heads) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = program - first * heads
    return inside // size, first + inside % size


@triton.jit
def turned(a, b, position, column, there, cos, sin, BACK, HALF: tl.constexpr):
    """Halves of queries or keys, fp32 [N, columns], turned by their positions; BACK = -1 turns gradients back."""
    angle = position[:, None] * HALF + column[None]
    c = tl.load(cos + angle, mask=there[None], other=0.0)
    s = tl.load(sin + angle, mask=there[None], other=0.0) * BACK
    return a * c - b * s, b * c + a * s


class Repeated:
    """Launches of one kernel in a loop, whose arguments differ only in what the kernel does not specialise on.

    From the second on they skip Triton's look-up of the compiled kernel, and tensors go as addresses, which the driver
    is not asked about: either takes longer than a small launch runs.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], *arguments: object, **options: object) -> None:
        """Launch: all that is no constexpr by position, the others by name."""
        if self.compiled is None:
            self.compiled = self.kernel[grid](*arguments, **options)  # None from the interpreter
        else:
            constants = [options[name] for name in self.kernel.arg_names[len(arguments) :]]
            plain = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
            self.compiled[grid](*plain, *constants)


def power_of_2(size: int, least: int = 16) -> int:
    """The smallest power of 2 that holds ``size``; tensor cores want 16 at least."""
    return max(least, 1 << max(0, size - 1).bit_length())


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


def multiprocessors(device: torch.device) -> int:
    """Of the card; few for the interpreter, which runs one program after the other."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if INTERPRET else 132
