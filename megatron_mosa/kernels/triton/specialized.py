"""The largest products of the layer, by Gluon's kernels for Hopper where they can, else by Triton's.

The environment variable ``MOSA_GLUON=0``, set before this module is imported, keeps all products in Triton.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch
import triton
from torch import Tensor

from megatron_mosa.kernels.triton.common import INTERPRET, can_be_described, cdiv, multiprocessors, strides
from megatron_mosa.kernels.triton.gathered import Rotation, gathered_product
from megatron_mosa.kernels.triton.rows import Rows
from megatron_mosa.kernels.triton.weights import weight_gradient

ENABLED = os.environ.get("MOSA_GLUON", "1") != "0"
TILE = 256  # of gathered tokens, or of columns
TESTED = "3.6."  # versions of Triton with which the kernels have run on a GPU; its Gluon may still change
# For each multiprocessor. With fewer, Triton's smaller tiles may be faster.
FEWEST_TILES = 0.95


@functools.cache
def _kernels(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"megatron_mosa.kernels.triton.{name}")
    except (ImportError, AttributeError):
        return None


def hopper() -> ModuleType | None:
    """Return the kernels of gathered rows, or None before Triton 3.6."""
    return _kernels("hopper")


def hopper_scattered() -> ModuleType | None:
    """Return the kernels of products that are summed over heads, or None before Triton 3.6."""
    return _kernels("hopper_scattered")


@functools.cache
def _is_supported(device: torch.device) -> bool:
    """Return whether the kernels run on a device; AMD's have capabilities of 9, too."""
    if not triton.__version__.startswith(TESTED):
        return False
    is_nvidia = device.type == "cuda" and torch.version.hip is None and not INTERPRET
    return is_nvidia and torch.cuda.get_device_capability(device)[0] == 9


def can_specialize(states: Tensor, heads: int, tiles: int, half: int, *operands: Tensor) -> bool:
    """Return whether the kernels take a product.

    Args:
        states: [B, T, h].
        heads: E.
        tiles: of the product, of 256 tokens or columns by all of q, k and v.
        half: half of the columns that rotate.
        operands: other tensors of half precision, the first of which is [E, ..., 3h'].
    """
    if not ENABLED or not _is_supported(states.device):
        return False
    batch, length, width = states.shape
    stride_b, stride_t = strides(states)
    size = operands[0].shape[2] // 3
    return (
        states.dtype in (torch.bfloat16, torch.float16)
        and size in (64, 128)
        and half in (0, size // 4)
        and width % 64 == 0
        and width >= 256  # at least four steps, more than stages
        and max(heads * width, (batch - 1) * stride_b + (length - 1) * stride_t + width) < 2**31
        and tiles * (size // 64) >= FEWEST_TILES * multiprocessors(states.device)
        and states.stride(2) == 1
        and not any(number % 8 for number in (stride_b, stride_t))
        and all(operand.is_contiguous() and operand.dtype == states.dtype for operand in operands)
        and not any(tensor.data_ptr() % 16 for tensor in (states, *operands))
        and hopper() is not None
    )


def ragged_product(
    values: Tensor,
    weight: Tensor,
    rows: Rows,
    pairs: tuple[Tensor, Tensor] | None,
    products: Tensor,
    sequences: int,
) -> Callable[[int, int], None] | None:
    """Return a function that, given a chunk and its first column, writes their products; None if the kernels cannot.

    Args:
        values: [E, R, d].
        weight: [E, d, h].
        rows: of the values.
        pairs: [E, R, PAIR] and [E, h], if any.
        products: [E, S * k, columns], which are written.
        sequences: S, of a chunk.
    """
    if not ENABLED or not _is_supported(values.device) or (kernels := hopper_scattered()) is None:
        return None
    heads, capacity, columns = products.shape
    boxes, rest = divmod(weight.shape[1], kernels.BOX_SIZE)
    matrix = weight.mT if weight.stride(1) == 1 else weight
    tensors = values, matrix, products, *(pairs or ())
    tiles = heads * cdiv(capacity, kernels.TILE_ROWS) * cdiv(columns, TILE)
    if (
        values.dtype not in (torch.bfloat16, torch.float16)
        or rest
        or (boxes, pairs is not None) not in kernels.CUT
        or tiles < FEWEST_TILES * multiprocessors(values.device)
        or any(tensor.dtype != values.dtype or not can_be_described(tensor) for tensor in tensors)
    ):
        return None
    return kernels.RaggedProduct(values, weight, rows, pairs, products, sequences)


def qkv_product(states: Tensor, rows: Rows, weight: Tensor, rotation: Rotation) -> Tensor:
    """Return queries, keys and values; see ``gathered_product``."""
    heads, capacity = rows.token_indices.shape
    tiles, half = heads * cdiv(capacity, TILE), rotation.cos.shape[1]
    if rotation.starts is None and can_specialize(states, heads, tiles, half, weight) and (kernels := hopper()):
        return kernels.qkv_product(states, rows, weight, rotation)
    return gathered_product(states, rows, weight, rotation)


def qkv_weight_gradient(
    states: Tensor, rows: Rows, dqkv: Tensor, output: Tensor, pairs: Tensor, pair_output: Tensor
) -> None:
    """Compute the gradients of the matrices and of the router; see ``weight_gradient``."""
    heads, width = len(dqkv), states.shape[2]
    can = width % TILE == 0 and can_specialize(states, heads, heads * width // TILE, 0, dqkv, output, pairs)
    if can and pair_output.is_contiguous() and (kernels := hopper()):
        kernels.qkv_weight_gradient(states, rows, dqkv, output, pairs, pair_output)
    else:
        weight_gradient(states, rows, dqkv, output, parts=3, pairs=pairs, pair_output=pair_output)
