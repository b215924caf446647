"""Where a layer keeps keys and values: dense heads all, local heads a window, MoSA heads what they selected.

Where torch.autocast is on for some calls alone, keys and values come in another type than those that are there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEP = 16  # rows, or blocks, that a buffer grows by at least
BLOCK = 16  # rows that a MoSA head takes at once


class Rows:
    """Keys and values of one kind of heads; None: nothing came yet."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """What is allocated."""
        return [tensor for tensor in (self.keys, self.values) if tensor is not None]

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        raise NotImplementedError

    def leave_inference_mode(self) -> None:
        """Copy what was made under torch.inference_mode, which may not be changed outside of it."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_inference():
                setattr(self, name, value.clone())

    def used_rows(self) -> int:
        """Rows in use, over heads and sequences."""
        raise NotImplementedError

    def bytes(self) -> tuple[int, int]:
        """Bytes allocated, and of them in use by keys and values."""
        allocated = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
        if self.keys is None:
            return 0, 0
        return allocated, 2 * self.used_rows() * self.keys.shape[-1] * self.keys.element_size()


class EqualRows(Rows):
    """As many rows for every head and sequence, [B, heads, rows + 1, h']; the last one takes what is to be dropped."""

    @property
    def rows(self) -> int:
        """Tokens that fit."""
        return 0 if self.keys is None else self.keys.shape[2] - 1

    def grow(self, like: Tensor, rows: int) -> None:
        """Make room for ``rows`` tokens of keys like [B, heads, n, h']; what is there stays."""
        old = self.keys, self.values
        shape = (*like.shape[:2], rows + 1, like.shape[3])
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        for before, now in zip(old, (self.keys, self.values), strict=True):
            if before is not None:
                now[:, :, : before.shape[2] - 1] = before[:, :, :-1]

    def make_room(self, like: Tensor, needed: int) -> None:
        """Grow, by a sixteenth more than is needed, if ``needed`` rows do not fit."""
        if needed > self.rows:
            self.grow(like, needed + max(STEP, needed // 16))

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (part.index_select(0, sequences) for part in (self.keys, self.values))


class DenseRows(EqualRows):
    """Every token, padding included, in the order of the columns of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, heads, T, h'] and return all that is there, [B, heads, length, h']."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.make_room(keys, self.length)
        assert self.keys is not None and self.values is not None
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def used_rows(self) -> int:
        """As Rows."""
        return 0 if self.keys is None else self.keys.shape[0] * self.keys.shape[1] * self.length


class WindowRows(EqualRows):
    """A ring of the last ``window`` tokens of every sequence: position p lies in row p % window; no padding."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.counts: Tensor | None = None  # [B], tokens of each sequence so far

    def read(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys and values [B, heads, window, h'] and their positions [B, window], negative where there is none."""
        if self.keys is None or self.values is None or self.counts is None:
            return None
        rows = torch.arange(self.window, device=self.keys.device)
        last = self.counts[:, None] - 1  # [B, 1]
        return self.keys[:, :, :-1], self.values[:, :, :-1], last - (last - rows) % self.window

    def write(self, keys: Tensor, values: Tensor, positions: Tensor, valid: Tensor | None) -> None:
        """Add [B, heads, T, h'] at positions [B or 1, T]; tokens that are not ``valid`` [B, T] are dropped."""
        if self.keys is None or self.values is None:
            self.grow(keys, self.window)
            self.counts = torch.zeros(keys.shape[0], dtype=torch.long, device=keys.device)
        assert self.keys is not None and self.values is not None and self.counts is not None
        batch, heads, length, _ = keys.shape
        new = length if valid is None else valid.sum(-1)
        self.counts = self.counts + new
        stays = positions >= self.counts[:, None] - self.window  # [B, T]: a later token has not taken its row
        if valid is not None:
            stays = stays & valid
        rows = torch.where(stays, positions % self.window, self.window)[:, None]  # [B, 1, T]
        sequence = torch.arange(batch, device=keys.device)[:, None, None]
        head = torch.arange(heads, device=keys.device)[:, None]
        self.keys[sequence, head, rows] = keys.to(self.keys.dtype)
        self.values[sequence, head, rows] = values.to(self.values.dtype)

    def select(self, sequences: Tensor) -> None:
        """As Rows."""
        super().select(sequences)
        self.counts = None if self.counts is None else self.counts[sequences]

    def used_rows(self) -> int:
        """As Rows."""
        if self.keys is None or self.counts is None:
            return 0
        return self.keys.shape[1] * int(self.counts.clamp(max=self.window).sum())


class SelectedRows(Rows):
    """The tokens that each head selected of each sequence: the n-th of them in row n, whatever its position.

    Heads select unequal numbers of tokens, so rows come in blocks of ``BLOCK`` from one pool, [blocks, BLOCK, h'], and
    ``table`` [B, E, n] names the blocks of each head and sequence. Block 0 takes what is to be dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Tensor | None = None  # [B, E], rows in use
        self.table: Tensor | None = None  # [B, E, n + 1]; the last column takes what is to be dropped
        # [3]: blocks in use, block 0 included; the largest count; how many counts fill their blocks, so that one more
        # token takes a new one
        self.totals: Tensor | None = None
        self.copied: tuple[Tensor, torch.cuda.Event] | None = None  # totals on the host, once the event is over

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"copied": None}  # an event cannot be copied, and what it waits for need not

    def leave_inference_mode(self) -> None:
        """As Rows."""
        super().leave_inference_mode()
        self.copied = None

    def tensors(self) -> list[Tensor]:
        """As Rows."""
        return super().tensors() + ([] if self.table is None else [self.table])

    def begin(self, like: Tensor, heads: int) -> None:
        """Before anything else: for sequences like [B, ...]."""
        if self.counts is None:
            self.counts = torch.zeros(like.shape[0], heads, dtype=torch.long, device=like.device)
            self.table = torch.zeros((*self.counts.shape, 1), dtype=torch.long, device=like.device)
            self.note(torch.tensor([1, 0, self.counts.numel()], device=like.device))

    def note(self, totals: Tensor) -> None:
        """Take over ``totals``, and begin to copy them to the host: who asks next waits for that, not this call."""
        self.totals = totals
        if not totals.is_cuda:
            return
        if self.copied is None:
            self.copied = torch.empty(3, dtype=torch.long, pin_memory=True), torch.cuda.Event()
        copy, event = self.copied
        copy.copy_(totals, non_blocking=True)
        event.record(torch.cuda.current_stream(totals.device))  # of the copy, on whatever device is the current one

    def known(self) -> list[int]:
        """``totals``, on the host."""
        assert self.totals is not None
        if self.copied is None:
            return self.totals.tolist()
        copy, event = self.copied
        event.synchronize()
        return copy.tolist()

    def make_room(self, like: Tensor, largest: int, blocks: int) -> None:
        """So that a head and sequence may have ``largest`` rows, and all together ``blocks``; keys like [.., h']."""
        columns = -(-largest // BLOCK)
        assert self.table is not None
        if columns >= self.table.shape[2]:
            grown = self.table.new_zeros(*self.table.shape[:2], columns + max(1, columns // 16) + 1)
            grown[:, :, : self.table.shape[2] - 1] = self.table[:, :, :-1]
            self.table = grown
        if self.keys is None or self.values is None or blocks > len(self.keys):
            shape = (blocks + max(STEP, blocks // 16), BLOCK, like.shape[-1])
            old, (self.keys, self.values) = (self.keys, self.values), (like.new_zeros(shape), like.new_zeros(shape))
            for before, now in zip(old, (self.keys, self.values), strict=True):
                if before is not None:
                    now[: len(before)] = before

    def make_room_for_one(self, like: Tensor) -> None:
        """So that every head of every sequence may take one more token."""
        blocks, largest, full = self.known()
        self.make_room(like, largest + 1, blocks + full)

    def put(
        self,
        index: tuple[Tensor, Tensor],
        rows: Tensor,
        there: Tensor | None,
        keys: Tensor,
        values: Tensor,
        first: Tensor,
    ) -> None:
        """Keys and values [..., h'] into rows [...] of sequences and heads; blocks are taken for them.

        Args:
            index: sequence and head, broadcast to [...].
            there: [...], False where there is nothing to be put; None: everywhere.
            first: [], the next block.
        """
        assert self.table is not None and self.keys is not None and self.values is not None
        begins = rows % BLOCK == 0
        begins = begins if there is None else begins & there
        blocks = first + begins.flatten().cumsum(0).view_as(begins) - 1  # [...]: the next ones, in order
        columns = rows // BLOCK
        self.table[(*index, columns.masked_fill(~begins, self.table.shape[2] - 1))] = blocks
        if there is not None:
            columns = columns.masked_fill(~there, 0)
        place = self.table[(*index, columns)]
        place = place if there is None else place.masked_fill(~there, 0)
        self.keys[place, rows % BLOCK] = keys.to(self.keys.dtype)
        self.values[place, rows % BLOCK] = values.to(self.values.dtype)

    def count(self, new: Tensor) -> None:
        """Add ``new`` [B, E] to the counts, and note the totals."""
        assert self.counts is not None and self.totals is not None
        before, self.counts = self.counts, self.counts + new
        blocks = (self.counts + BLOCK - 1) // BLOCK - (before + BLOCK - 1) // BLOCK
        full = self.counts % BLOCK == 0
        self.note(torch.stack((self.totals[0] + blocks.sum(), self.counts.max(), full.sum())))

    def add_packed(self, keys: Tensor, values: Tensor, there: Tensor) -> Tensor:
        """Add [B, E, k, h'], those that are ``there`` [B, E, k], which come first; return their rows, [B, E, k]."""
        self.begin(keys, keys.shape[1])
        assert self.counts is not None and self.totals is not None
        before, first = self.counts, self.totals[0]
        self.count(there.sum(-1))
        blocks, largest, _ = self.known()
        self.make_room(keys, largest, blocks)
        rows = before[..., None] + torch.arange(keys.shape[2], device=keys.device)
        sequence = torch.arange(len(keys), device=keys.device)[:, None, None]
        head = torch.arange(keys.shape[1], device=keys.device)[:, None]
        self.put((sequence, head), rows, there, keys, values, first)
        return rows

    def add_pairs(self, chosen: Tensor, index: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> Tensor:
        """Add a token of n pairs of a sequence and a head, [n, h'], which ``chosen`` [B, E] has; return their rows."""
        assert self.counts is not None and self.totals is not None
        self.make_room_for_one(keys)
        rows = self.counts[index]  # [n]
        self.put(index, rows, None, keys, values, self.totals[0])
        self.count(chosen)
        return rows

    def read(self, index: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of pairs [n, rows, h'], or of all [B, E, rows, h']; rows beyond a count mean nothing."""
        assert self.table is not None and self.keys is not None and self.values is not None
        columns = slice(0, -(-self.known()[1] // BLOCK))
        blocks = self.table[:, :, columns] if index is None else self.table[(*index, columns)]
        return self.keys[blocks].flatten(-3, -2), self.values[blocks].flatten(-3, -2)

    def select(self, sequences: Tensor) -> None:
        """As Rows; every sequence gets blocks of its own."""
        if self.counts is None or self.table is None or self.keys is None or self.values is None:
            return
        self.counts, table = self.counts[sequences], self.table[sequences]
        used = torch.arange(table.shape[2], device=table.device) < (self.counts[..., None] + BLOCK - 1) // BLOCK
        blocks = torch.cat((table.new_zeros(1), table[used]))  # old numbers, block 0 first
        self.keys, self.values = self.keys[blocks], self.values[blocks]
        self.table = torch.zeros_like(table)
        self.table[used] = torch.arange(1, len(blocks), device=table.device)
        full = self.counts % BLOCK == 0
        self.note(torch.stack((full.new_full((), len(blocks), dtype=torch.long), self.counts.max(), full.sum())))

    def used_rows(self) -> int:
        """As Rows."""
        return 0 if self.counts is None else int(self.counts.sum())
