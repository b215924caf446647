"""Positions, rotary angles and padding of the tokens that a call computes, and the choice of some by their keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cache_mosa import MosaCache
from .configuration_mosa import MosaConfig
from .room_mosa import Trial


class Strided(NamedTuple):
    """The tokens of a call whose position is a multiple of ``fixed_stride``; fixed heads need them."""

    columns: Tensor
    """[B or 1, k], in order; unused slots come last and hold other columns."""

    rows: Tensor
    """[B or 1, k]: the position, divided by the stride."""

    valid: Tensor | None
    """[B, k], False in unused slots; None: there are none."""

    total: int
    """Number of such tokens up to here of the sequence with the most."""


class Tokens(NamedTuple):
    """Facts about the tokens of a call that every layer needs and the model computes once."""

    positions: Tensor
    """[B or 1, T], counted in each sequence without its padding."""

    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the positions, [B or 1, T, n] for n pairs of channels."""

    valid: Tensor | None = None
    """[B, T], False at padding; None: there is no padding."""

    valid_keys: Tensor | None = None
    """[B, columns], the same for all columns so far, including these."""

    lengths: list[int] | None = None
    """Number of tokens of each sequence without padding; only used by expert choice and Routing heads."""

    strided: Strided | None = None
    """None without fixed heads."""

    trial: Trial | None = None
    """Of a prompt of which MoSA heads may guess how many tokens they select; None: they must not guess."""


class Column(NamedTuple):
    """The column of the input in which a captured step adds one token to every sequence; the device knows it."""

    own: Tensor
    """long [1]."""

    length: Tensor
    """long [1]: number of columns, including it."""

    valid: Tensor | None
    """bool [B, columns], which tokens are attended to: padding only by itself, in its own step. None: all."""


def rotary_tables(positions: Tensor, config: MosaConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, [..., n] each, for the n pairs of channels that are rotated at positions [...]."""
    size = 2 * int(config.head_dim * config.rotary_percent / 2)
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / max(size, 1)
    angles = positions.float().unsqueeze(-1) * config.rotary_base**-exponents
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the leading channels of queries or keys [..., h'] (half-split pairs); cos and sin [..., n]."""
    size = 2 * cos.shape[-1]
    if size == 0:
        return states
    first, second = states[..., :size].float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(states.dtype), states[..., size:]), dim=-1)


def largest(keys: Tensor, tokens: Tokens, count: Callable[[int], int]) -> Tensor:
    """Return the columns of the largest keys of each row, in order, [B, E, k], from [B, E, T].

    Ties go to the earlier token. A sequence with padding selects as many tokens as it would alone, and no padding;
    slots that stay empty come last and hold T.

    Args:
        count: the number of tokens to select from so many.
    """
    length = keys.shape[-1]
    if tokens.valid is None or tokens.lengths is None:
        ranked = torch.sort(keys, dim=-1, descending=True, stable=True).indices
        return ranked[..., : count(length)].sort(dim=-1).values
    keys = keys.masked_fill(~tokens.valid[:, None], -torch.inf)
    counts = [count(number) for number in tokens.lengths]
    ranked = torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., : max(counts)]
    rank = torch.arange(max(counts), device=keys.device)
    is_unused = rank >= torch.tensor(counts, device=keys.device)[:, None]  # [B, k]
    return ranked.masked_fill(is_unused[:, None], length).sort(dim=-1).values


def check_mask(attention_mask: Tensor | None, batch: int, columns: int, is_padded: bool) -> None:
    """Check the mask of a call up to a column.

    Raises:
        ValueError: the mask has another shape, or is missing although the cache began with one.
    """
    if attention_mask is not None and attention_mask.shape != (batch, columns):
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; expected {(batch, columns)}")
    if attention_mask is None and is_padded:
        raise ValueError(f"attention_mask is missing, and the cache began with one; expected {(batch, columns)}, ones")


def read_tokens(
    attention_mask: Tensor | None, hidden_states: Tensor, cache: MosaCache | None, config: MosaConfig
) -> Tokens:
    """Compute positions and padding of the tokens [B, T, h] that follow those in the cache.

    Raises:
        ValueError: the mask has another shape, masks a whole sequence, or is missing although the cache began with one.
    """
    batch, length, _ = hidden_states.shape
    columns = length + (0 if cache is None else cache.get_seq_length())
    device = hidden_states.device
    padded = cache is not None and cache.padded
    check_mask(attention_mask, batch, columns, padded)
    # The mask of a single token is not inspected, which would wait for the device, but assumed to contain padding.
    if attention_mask is None or (not padded and length > 1 and bool((attention_mask == 1).all())):
        first = columns - length
        positions = torch.arange(first, columns, device=device)[None]  # [1, T]
        strided = None
        if config.num_fixed_heads:
            multiples = positions[:, -first % config.fixed_stride :: config.fixed_stride]  # [1, k]
            total = -(-columns // config.fixed_stride)
            strided = Strided(multiples - first, multiples // config.fixed_stride, None, total)
        return Tokens(positions, rotary_tables(positions, config), strided=strided)
    mask = attention_mask.to(device=device, dtype=torch.bool)
    lengths = None
    if cache is None:
        lengths = mask.sum(dim=1).tolist()
        if 0 in lengths:
            raise ValueError(f"attention_mask is 0 throughout sequence {lengths.index(0)}; expected a 1 at every token")
    else:
        cache.padded = True
    positions = (mask.long().cumsum(dim=1) - 1)[:, -length:].clamp(min=0)  # [B, T]
    valid = mask[:, -length:]
    strided = _strided(positions, valid, config.fixed_stride) if config.num_fixed_heads else None
    return Tokens(positions, rotary_tables(positions, config), valid, mask, lengths, strided)


def _strided(positions: Tensor, valid: Tensor, stride: int) -> Strided:
    """Find the tokens at multiples of the stride in sequences with padding. Waits for the device, once per call."""
    chosen = (positions % stride == 0) & valid  # [B, T]
    counts = chosen.sum(-1)
    used, last = torch.stack((counts.max(), positions.max())).tolist()
    columns = chosen.long().argsort(dim=-1, descending=True, stable=True)[:, :used]
    is_used = torch.arange(used, device=positions.device) < counts[:, None]
    return Strided(columns, positions.gather(1, columns) // stride, is_used, last // stride + 1)
