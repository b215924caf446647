"""Where the rows of the heads lie: which tokens a head takes, and which rows a token has."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mosa.kernels.triton.common import power_of_2

HEADS = 32  # one bit each in a word of the map
# What one program takes at a time:
SEQUENCES = 16
SLOTS = 256  # at most
TOKENS = 128
ROWS = 512


class Rows(NamedTuple):
    """The rows of a head are its filled slots, in the order of sequences and then of positions, without gaps."""

    places: Tensor
    """int32 [E, B * k]: the token of each row, as b << ``bits_of(T)`` | t; undefined behind a head's last row."""

    starts: Tensor
    """int32 [E, B + 1]: the first row of each sequence; the last is the head's number of rows."""

    offsets: Tensor
    """int32 [B * T + 1]: where each token's entries begin."""

    entries: Tensor
    """int32 [B * E * k]: the slots that hold each token, in the order of heads, as e * k + slot."""


def bits_of(length: int) -> int:
    """How many bits a token takes in its place, so that kernels need no division to find its sequence."""
    return max(1, (length - 1).bit_length())


@triton.jit
def sequence_and_token(place, SHIFT: tl.constexpr):
    """Of a place."""
    batch = place >> SHIFT
    return batch, place - (batch << SHIFT)


@triton.jit(do_not_specialize=["B"])
def _starts_kernel(indices, starts, B, E, K, T, SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):
    """Count the filled slots of one head, and add them up over the sequences."""
    head = tl.program_id(0)
    row = starts + head * (B + 1)
    total = 0
    tl.store(row, total)
    for first in range(0, B, SEQUENCES):
        batch = first + tl.arange(0, SEQUENCES)
        count = tl.zeros((SEQUENCES,), dtype=tl.int32)
        for slot in range(0, K, BLOCK):
            slots = slot + tl.arange(0, BLOCK)
            there = (batch < B)[:, None] & (slots < K)[None]
            offsets = ((batch.to(tl.int64) * E + head) * K)[:, None] + slots[None]
            count += tl.sum((tl.load(indices + offsets, mask=there, other=T) < T).to(tl.int32), axis=1)
        tl.store(row + 1 + batch, total + tl.cumsum(count), mask=batch < B)
        total += tl.sum(count)


@triton.jit(do_not_specialize=["B"])
def _pack_kernel(
    indices, starts, places, taken_by, B, E, R, K, T, GROUPS,
    SHIFT: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the places of one head in one sequence, and its bit in the words of its tokens."""
    head, batch = tl.program_id(0), tl.program_id(1)
    begin = tl.load(starts + head * (B + 1) + batch)
    count = tl.load(starts + head * (B + 1) + batch + 1) - begin
    slots = indices + (batch.to(tl.int64) * E + head) * K
    words = taken_by + (batch.to(tl.int64) * GROUPS + head // HEADS) * T
    for first in range(0, count, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        token = tl.load(slots + slot, mask=slot < count, other=0).to(tl.int32)
        tl.store(places + head.to(tl.int64) * R + begin + slot, (batch << SHIFT) + token, mask=slot < count)
        bit = tl.full((BLOCK,), 1, tl.int32) << (head % HEADS)
        tl.atomic_or(words + token, bit, mask=slot < count, sem="relaxed")  # bits in any order are the same word


@triton.jit
def _bits(word):
    """How many bits of an int32 are set."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _count_kernel(taken_by, before, offsets, T, GROUPS, TOKENS: tl.constexpr):
    """How many rows a token has: in the groups of heads before each, and in all."""
    batch = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    count = tl.zeros((TOKENS,), dtype=tl.int32)
    for group in range(GROUPS):
        word = (batch.to(tl.int64) * GROUPS + group) * T + token
        tl.store(before + word, count, mask=token < T)
        count += _bits(tl.load(taken_by + word, mask=token < T, other=0))
    tl.store(offsets + 1 + batch.to(tl.int64) * T + token, count, mask=token < T)


@triton.jit(do_not_specialize=["B"])
def _entries_kernel(
    places, starts, taken_by, before, offsets, entries, B, R, K, T, GROUPS,
    SHIFT: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = row < tl.load(starts + head * (B + 1) + B)
    place = tl.load(places + head.to(tl.int64) * R + row, mask=there, other=0)
    batch, token = sequence_and_token(place, SHIFT)
    word = (batch.to(tl.int64) * GROUPS + head // HEADS) * T + token
    lower = tl.load(taken_by + word, mask=there, other=0) & ((tl.full((BLOCK,), 1, tl.int32) << (head % HEADS)) - 1)
    entry = (
        tl.load(offsets + batch.to(tl.int64) * T + token, mask=there, other=0)
        + tl.load(before + word, mask=there, other=0)
        + _bits(lower)
    )
    slot = row - tl.load(starts + head * (B + 1) + batch, mask=there, other=0)
    tl.store(entries + entry, head * K + slot, mask=there)


def rows_of(indices: Tensor, length: int) -> Rows:
    """The rows of a selection, int64 [B, E, k] with T in empty slots, which are a head's last in a sequence.

    Raises:
        ValueError: B * E * k, or B times T rounded up to a power of 2, is beyond int32.
    """
    batch, heads, selected = indices.shape
    rows, device = batch * selected, indices.device
    shift = bits_of(length)
    if max(indices.numel(), batch << shift) >= 2**31:
        raise ValueError(
            f"B * E * k = {indices.numel()} selected tokens, B = {batch} sequences of T = {length}; "
            f"expected B * E * k and B * {1 << shift} below {2**31}"
        )
    starts = torch.empty((heads, batch + 1), dtype=torch.int32, device=device)
    block = min(power_of_2(selected), SLOTS)
    _starts_kernel[(heads,)](indices, starts, batch, heads, selected, length, SEQUENCES=SEQUENCES, BLOCK=block)
    groups = triton.cdiv(heads, HEADS)
    places = torch.empty((heads, rows), dtype=torch.int32, device=device)
    taken_by = torch.zeros((batch, groups, length), dtype=torch.int32, device=device)
    _pack_kernel[(heads, batch)](
        indices, starts, places, taken_by, batch, heads, rows, selected, length, groups,
        SHIFT=shift, HEADS=HEADS, BLOCK=block,
        num_warps=max(1, block // 64),
    )  # fmt: skip
    before = torch.empty_like(taken_by)
    counts = torch.zeros(batch * length + 1, dtype=torch.int32, device=device)
    _count_kernel[(triton.cdiv(length, TOKENS), batch)](taken_by, before, counts, length, groups, TOKENS=TOKENS)
    offsets = counts.cumsum(0, dtype=torch.int32)
    entries = torch.empty(indices.numel(), dtype=torch.int32, device=device)
    _entries_kernel[(triton.cdiv(rows, ROWS), heads)](
        places, starts, taken_by, before, offsets, entries, batch, rows, selected, length, groups,
        SHIFT=shift, HEADS=HEADS, BLOCK=ROWS,
    )  # fmt: skip
    return Rows(places, starts, offsets, entries)
