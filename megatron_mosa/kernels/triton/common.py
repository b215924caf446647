"""Shared parts of the kernels: matrix products, rotation, the order of programs, repeated launches.

Names in kernels: p_ pointers, o_ offsets, b_ blocks of values, i_ indices, m_ masks. Capitals are sizes: B sequences of
T tokens of width H; E heads of width D with K slots each; R = B * K rows of a head.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

try:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
except ImportError:  # before Triton 3.5
    GluonDescriptor = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def dot(b_a, b_b, b_accumulator, INTERPRETED: tl.constexpr):
    """Return accumulator + a @ b in fp32; products of fp32 are IEEE products, not TF32."""
    if INTERPRETED:  # the interpreter's product of bf16 is wrong
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_accumulator, input_precision="ieee")


@triton.jit
def grouped(i_program, tiles, heads, GROUP):
    """Return head and tile of a program, ordered so that GROUP tiles of all heads run before the next tiles.

    The tokens of these tiles, which all heads gather from, then stay in the L2 cache, and so do the weights of a head
    for its GROUP tiles.
    """
    i_first = i_program // (GROUP * heads) * GROUP
    size = tl.minimum(tiles - i_first, GROUP)
    i_inside = i_program - i_first * heads
    return i_inside // size, i_first + i_inside % size


@triton.jit
def rotate(b_first, b_second, b_position, o_column, m_column, p_cos, p_sin, DIRECTION, HALF: tl.constexpr):
    """Rotate the two halves of queries or keys, fp32 [N, columns]; DIRECTION = -1 inverts it, for gradients."""
    o_angle = b_position[:, None] * HALF + o_column[None]
    b_cos = tl.load(p_cos + o_angle, mask=m_column[None], other=0.0)
    b_sin = tl.load(p_sin + o_angle, mask=m_column[None], other=0.0) * DIRECTION
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


# The kernel (kept alive, since its id is in the key), what it was compiled to, and its constexprs; by all that the
# compiled kernel depends on.
_COMPILED: dict[tuple[object, ...], tuple[Any, Any, list[object]]] = {}
MOST_COMPILED = 4096  # entries; numbers beyond 31 bits have one each


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: object) -> None:
    """Launch a kernel as ``kernel[grid]`` does, in less time if a similar launch came before.

    Then Triton does not look up the compiled kernel, and tensors are passed as addresses, which need no query of the
    driver. Either would take longer than a small kernel runs.

    Args:
        grid: number of programs.
        arguments: tensors, all on the same device, descriptors of tensors, and numbers.
        options: constexprs and launch options.
    """
    key: list[Any] = [id(kernel)]
    plain, device = [], None
    for value in arguments:  # without a call per argument, which would take most of the time
        kind = type(value)
        if kind is int:
            # Triton compiles other kernels for 1, for multiples of 16, and for what needs 64 bits.
            key.append(value if value >= 1 << 31 or value < 0 else 0 if not value & 15 else 1 if value == 1 else 2)
        elif value is None or kind is float or kind is bool:
            key.append(kind)
        elif kind is TensorDescriptor or kind is GluonDescriptor:
            device = value.base.get_device() if device is None else device
            key += kind, value.base.dtype, *value.block_shape
        else:
            device = value.get_device() if device is None else device
            plain.append(address := value.data_ptr())
            key += value.dtype, address & 15
            continue
        plain.append(value)
    whole = (*key, device, *options, *options.values())
    if (found := _COMPILED.get(whole)) is None:
        if len(_COMPILED) >= MOST_COMPILED:
            _COMPILED.clear()
        if (compiled := kernel[grid](*arguments, **options)) is not None:  # as it is in the interpreter
            _COMPILED[whole] = kernel, compiled, [options[name] for name in kernel.arg_names[len(arguments) :]]
        return
    _, compiled, constants = found
    compiled[(*grid, 1, 1)[:3]](*plain, *constants)


def cdiv(size: int, block: int) -> int:
    """Return the number of blocks that cover a size; ``triton.cdiv`` takes microseconds, since kernels can call it."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """Return the smallest power of 2 that is at least ``size`` and at least 16, the minimum of tensor cores."""
    return max(16, 1 << max(0, size - 1).bit_length())


def strides(states: Tensor) -> tuple[int, int]:
    """Return the strides of sequences and tokens of [B, T, h]."""
    return states.stride(0), states.stride(1)


def with_contiguous_rows(states: Tensor) -> Tensor:
    """Return the tensor itself if its last dimension is contiguous, else a contiguous copy."""
    return states if states.stride(-1) == 1 else states.contiguous()


def optional_contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor, or None for None."""
    return None if tensor is None else tensor.contiguous()


# Cached, because asking torch for a property of a device takes as long as a launch.
@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the shared memory of one program in bytes; Hopper's without a GPU (interpreter, cross-compilation)."""
    if device.type != "cuda":
        return 232_448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Return whether tiles are moved by descriptors: from Hopper on, and without a GPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def can_be_described(tensor: Tensor) -> bool:
    """Return whether a descriptor can be made of a tensor, which must be aligned to 16 bytes in all dimensions."""
    if TensorDescriptor is None or not has_descriptors(tensor.device):
        return False
    *outer, last = tensor.stride()
    return last == 1 and not any(offset % 16 for offset in (tensor.data_ptr(), *(tensor.itemsize * s for s in outer)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of the GPU; 1 for the interpreter, which runs programs one by one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if INTERPRET else 132
