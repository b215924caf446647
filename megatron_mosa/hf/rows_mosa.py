"""Store a layer's keys and values: all tokens of dense heads, a window of local heads, some of fixed and MoSA heads.

If torch.autocast is active in some calls only, new keys and values differ in dtype from the stored ones.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor

MIN_GROWTH = 16  # rows, or blocks, that a buffer grows by at least
BLOCK = 16  # rows that a MoSA head allocates at once
_CHANGES = count()


class Rows:
    """Keys and values of one kind of heads; None: nothing is stored yet."""

    def __init__(self) -> None:
        self.changes = next(_CHANGES)  # a number that no other has, whenever a tensor is replaced by another
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value is not getattr(self, name, None):
            super().__setattr__("changes", next(_CHANGES))
        super().__setattr__(name, value)

    def tensors(self) -> list[Tensor]:
        """Return the allocated tensors."""
        return [tensor for tensor in (self.keys, self.values) if tensor is not None]

    def select_sequences(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        raise NotImplementedError

    def leave_inference_mode(self) -> None:
        """Copy tensors created under torch.inference_mode, which may not be modified outside of it."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_inference():
                setattr(self, name, value.clone())

    def used_rows(self) -> int:
        """Return the number of rows in use, over all heads and sequences."""
        raise NotImplementedError

    def bytes(self) -> tuple[int, int]:
        """Return the bytes allocated, and those in use by keys and values."""
        allocated = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
        if self.keys is None:
            return 0, 0
        return allocated, 2 * self.used_rows() * self.keys.shape[-1] * self.keys.element_size()


class UniformRows(Rows):
    """The same number of rows for every head and sequence, [B, heads, rows + 1, h']; the last row is discarded."""

    @property
    def rows(self) -> int:
        """Number of tokens that fit."""
        return 0 if self.keys is None else self.keys.shape[2] - 1

    def grow(self, like: Tensor, rows: int) -> None:
        """Allocate ``rows`` rows for keys like [B, heads, n, h'], and copy what is stored."""
        old = self.keys, self.values
        shape = (*like.shape[:2], rows + 1, like.shape[3])
        self.keys, self.values = like.new_zeros(2, *shape).unbind()
        for before, now in zip(old, (self.keys, self.values), strict=True):
            if before is not None:
                now[:, :, : before.shape[2] - 1] = before[:, :, :-1]

    def reserve(self, like: Tensor, needed: int) -> None:
        """Make room for ``needed`` rows; if they do not fit, allocate a sixteenth more than needed."""
        if needed > self.rows:
            self.grow(like, needed + max(MIN_GROWTH, needed // 16))

    def select_sequences(self, indices: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (part.index_select(0, indices) for part in (self.keys, self.values))


class DenseRows(UniformRows):
    """All tokens, including padding, in the order of the input's columns."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, heads, T, h'] and return everything stored, [B, heads, length, h']."""
        start, self.length = self.length, self.length + keys.shape[2]
        self.reserve(keys, self.length)
        assert self.keys is not None and self.values is not None
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def used_rows(self) -> int:
        return 0 if self.keys is None else self.keys.shape[0] * self.keys.shape[1] * self.length


class WindowRows(UniformRows):
    """A ring buffer of the last ``window`` tokens of each sequence without padding: position p is in row p % window."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.counts: Tensor | None = None  # [B], tokens of each sequence so far

    def read(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return keys and values [B, heads, window, h'] and their positions [B, window], negative for unused rows."""
        if self.keys is None or self.values is None or self.counts is None:
            return None
        rows = torch.arange(self.window, device=self.keys.device)
        last = self.counts[:, None] - 1  # [B, 1]
        return self.keys[:, :, :-1], self.values[:, :, :-1], last - (last - rows) % self.window

    def write(self, keys: Tensor, values: Tensor, positions: Tensor, valid: Tensor | None) -> None:
        """Store [B, heads, T, h'] at positions [B or 1, T], except for tokens that are not ``valid`` [B, T]."""
        if self.keys is None or self.values is None:
            self.grow(keys, self.window)
            self.counts = torch.zeros(keys.shape[0], dtype=torch.long, device=keys.device)
        assert self.keys is not None and self.values is not None and self.counts is not None
        batch, heads, length, _ = keys.shape
        new = length if valid is None else valid.sum(-1)
        self.counts = self.counts + new
        is_kept = positions >= self.counts[:, None] - self.window  # [B, T]: no later token takes its row
        if valid is not None:
            is_kept = is_kept & valid
        rows = torch.where(is_kept, positions % self.window, self.window)[:, None]  # [B, 1, T]
        sequence = torch.arange(batch, device=keys.device)[:, None, None]
        head = torch.arange(heads, device=keys.device)[:, None]
        self.keys[sequence, head, rows] = keys.to(self.keys.dtype)
        self.values[sequence, head, rows] = values.to(self.values.dtype)

    def count_one(self, positions: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Count one token at positions [B or 1, 1]; return its row, [B or 1], and the number of rows in use, [B].

        The caller is to store it. Nothing moves in memory, unlike in ``write``. The rows in use are its window.
        """
        assert self.counts is not None
        rows = positions[:, 0] % self.window
        if valid is None:
            self.counts += 1
        else:
            rows = torch.where(valid[:, 0], rows, self.window)
            self.counts += valid[:, 0]
        return rows, self.counts.clamp(1, self.window)

    def select_sequences(self, indices: Tensor) -> None:
        super().select_sequences(indices)
        self.counts = None if self.counts is None else self.counts[indices]

    def used_rows(self) -> int:
        if self.keys is None or self.counts is None:
            return 0
        return self.keys.shape[1] * int(self.counts.clamp(max=self.window).sum())


class FixedRows(UniformRows):
    """Every so many tokens of each sequence; row n holds the n-th of them. Sequences may have different numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Tensor | None = None  # [B], rows in use

    def add(
        self, keys: Tensor, values: Tensor, rows: Tensor, valid: Tensor | None, total: int
    ) -> tuple[Tensor, Tensor]:
        """Store [B, heads, k, h'] in ``rows`` [B, k] and return the first ``total`` rows, [B, heads, total, h'].

        Args:
            valid: [B, k], False where there is nothing to store; None: everything is stored.
            total: rows in use of the sequence with the most, including these.
        """
        self.reserve(keys, total)
        assert self.keys is not None and self.values is not None
        if self.counts is None:
            self.counts = torch.zeros(keys.shape[0], dtype=torch.long, device=keys.device)
        self.counts = self.counts + (rows.shape[1] if valid is None else valid.sum(-1))
        target = (rows if valid is None else rows.masked_fill(~valid, self.rows)).unsqueeze(1)  # [B, 1, k]
        sequence = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
        head = torch.arange(keys.shape[1], device=keys.device)[:, None]
        self.keys[sequence, head, target] = keys.to(self.keys.dtype)
        self.values[sequence, head, target] = values.to(self.values.dtype)
        return self.keys[:, :, :total], self.values[:, :, :total]

    def select_sequences(self, indices: Tensor) -> None:
        super().select_sequences(indices)
        self.counts = None if self.counts is None else self.counts[indices]

    def used_rows(self) -> int:
        return 0 if self.keys is None or self.counts is None else self.keys.shape[1] * int(self.counts.sum())


def to_dtype(dtype: torch.dtype, keys_and_values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Convert cached keys and values to the queries' dtype, which torch.autocast may have changed in between."""
    keys, values = keys_and_values
    return keys.to(dtype), values.to(dtype)


def with_spare(blocks: int) -> int:
    """Return how many blocks to allocate where so many are needed."""
    return blocks + max(MIN_GROWTH, blocks // 16)


class SelectedRows(Rows):
    """The tokens that each head has selected of each sequence; row n holds the n-th of them, at any position.

    Heads select different numbers of tokens, so rows are allocated in blocks of ``BLOCK`` from one pool,
    [blocks, BLOCK, h']. ``table`` [B, E, n] has the block numbers of each head and sequence. Block 0 is discarded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Tensor | None = None  # [B, E], rows in use
        self.table: Tensor | None = None  # [B, E, n + 1]; the last column is discarded
        # [3]: blocks in use, including block 0; the largest count; how many counts fill their blocks, so that their
        # next token needs a new block
        self.totals: Tensor | None = None
        self.host_copy: tuple[Tensor, torch.cuda.Event] | None = None  # of totals, valid once the event is complete
        self.is_ahead = False  # captured steps have changed totals since they were copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"host_copy": None}  # an event cannot be copied; copies read totals from the device

    def leave_inference_mode(self) -> None:
        super().leave_inference_mode()
        self.host_copy = None

    def tensors(self) -> list[Tensor]:
        return super().tensors() + ([] if self.table is None else [self.table])

    def initialize(self, like: Tensor, heads: int) -> None:
        """Prepare for sequences like [B, ...]; to be called before all others."""
        if self.counts is None:
            self.counts = torch.zeros(like.shape[0], heads, dtype=torch.long, device=like.device)
            self.table = torch.zeros((*self.counts.shape, 1), dtype=torch.long, device=like.device)
            self.set_totals(torch.tensor([1, 0, self.counts.numel()], device=like.device))

    def set_totals(self, totals: Tensor) -> None:
        """Set ``totals`` and start copying them to the host, so that only the next reader waits for the device."""
        self.totals, self.is_ahead = totals, False
        if not totals.is_cuda:
            return
        if self.host_copy is None:
            self.host_copy = torch.empty(3, dtype=torch.long, device="cpu", pin_memory=True), torch.cuda.Event()
        copy, event = self.host_copy
        copy.copy_(totals, non_blocking=True)
        event.record(torch.cuda.current_stream(totals.device))  # the stream of the copy, whatever the current device

    def host_totals(self) -> list[int]:
        """Return ``totals`` on the host, waiting for the copy if necessary."""
        assert self.totals is not None
        if self.host_copy is None or self.is_ahead:
            return self.totals.tolist()
        copy, event = self.host_copy
        event.synchronize()
        return copy.tolist()

    def reserve(self, like: Tensor, largest: int, blocks: int) -> None:
        """Make room for ``largest`` rows per head and sequence and ``blocks`` blocks in total; keys like [.., h']."""
        columns = -(-largest // BLOCK)
        assert self.counts is not None
        if self.table is None or columns >= self.table.shape[2]:
            grown = self.counts.new_zeros(*self.counts.shape, columns + max(1, columns // 16) + 1)
            if self.table is not None:
                grown[:, :, : self.table.shape[2] - 1] = self.table[:, :, :-1]
            self.table = grown
        if self.keys is None or self.values is None or blocks > len(self.keys):
            shape = (with_spare(blocks), BLOCK, like.shape[-1])
            old, (self.keys, self.values) = (self.keys, self.values), like.new_zeros(2, *shape).unbind()
            for before, now in zip(old, (self.keys, self.values), strict=True):
                if before is not None:
                    now[: len(before)] = before

    def shrink(self, blocks: int) -> None:
        """Give back the room beyond that of ``reserve`` for ``blocks`` blocks, if it is more than a quarter of that."""
        if self.keys is not None and self.values is not None and len(self.keys) > 1.25 * with_spare(blocks):
            self.keys, self.values = (part[: with_spare(blocks)].clone() for part in (self.keys, self.values))

    def reserve_one(self, like: Tensor) -> None:
        """Make room for one more token of every head and sequence."""
        blocks, largest, full = self.host_totals()
        self.reserve(like, largest + 1, blocks + full)

    def has_room(self, totals: list[int], tokens: int) -> bool:
        """Return whether ``tokens`` more of every head and sequence fit, BLOCK at most, after such ``totals``."""
        assert self.counts is not None and self.table is not None and self.keys is not None
        blocks, largest, _ = totals
        return largest + tokens <= BLOCK * (self.table.shape[2] - 1) and blocks + self.counts.numel() <= len(self.keys)

    def reserve_ahead(self, like: Tensor, tokens: int, share: float) -> None:
        """Make room for so many tokens of every sequence, if all heads together select at most ``share`` of them.

        There is room for BLOCK more tokens of every head and sequence in any case.
        """
        assert self.counts is not None
        blocks, largest, _ = self.host_totals()
        pairs = self.counts.numel()
        self.reserve(like, largest + tokens, blocks + pairs + int(pairs * tokens * share / BLOCK))

    def store(
        self,
        index: tuple[Tensor, Tensor],
        rows: Tensor,
        valid: Tensor | None,
        keys: Tensor,
        values: Tensor,
        next_block: Tensor,
    ) -> None:
        """Store keys and values [..., h'] in rows [...] of sequences and heads, with new blocks where needed.

        Args:
            index: sequences and heads, broadcast to [...].
            rows: row numbers.
            valid: [...], False where there is nothing to store; None: everything is stored.
            keys, values: [..., h'].
            next_block: [], the first unused block.
        """
        assert self.table is not None and self.keys is not None and self.values is not None
        is_new = rows % BLOCK == 0
        is_new = is_new if valid is None else is_new & valid
        blocks = next_block + is_new.flatten().cumsum(0).view_as(is_new) - 1  # [...]: unused blocks in order
        columns = rows // BLOCK
        self.table[(*index, columns.masked_fill(~is_new, self.table.shape[2] - 1))] = blocks
        if valid is not None:
            columns = columns.masked_fill(~valid, 0)
        block = self.table[(*index, columns)]
        block = block if valid is None else block.masked_fill(~valid, 0)
        self.keys[block, rows % BLOCK] = keys.to(self.keys.dtype)
        self.values[block, rows % BLOCK] = values.to(self.values.dtype)

    def add_to_counts(self, new: Tensor) -> None:
        """Add ``new`` [B, E] to the counts, and update the totals."""
        assert self.counts is not None and self.totals is not None
        before, self.counts = self.counts, self.counts + new
        blocks = (self.counts + BLOCK - 1) // BLOCK - (before + BLOCK - 1) // BLOCK
        full = self.counts % BLOCK == 0
        self.set_totals(torch.stack((self.totals[0] + blocks.sum(), self.counts.max(), full.sum())))

    def begin(self, counts: Tensor, totals: Tensor) -> None:
        """Count the first tokens, long [B, E], with their ``totals``; the caller then reserves room and stores them."""
        self.counts = counts
        self.set_totals(totals)

    def add_packed(self, keys: Tensor, values: Tensor, valid: Tensor) -> Tensor:
        """Add [B, E, k, h'], of which the ``valid`` ones [B, E, k] come first; return their rows, [B, E, k]."""
        self.initialize(keys, keys.shape[1])
        assert self.counts is not None and self.totals is not None
        before, next_block = self.counts, self.totals[0]
        self.add_to_counts(valid.sum(-1))
        blocks, largest, _ = self.host_totals()
        self.reserve(keys, largest, blocks)
        rows = before[..., None] + torch.arange(keys.shape[2], device=keys.device)
        sequence = torch.arange(len(keys), device=keys.device)[:, None, None]
        head = torch.arange(keys.shape[1], device=keys.device)[:, None]
        self.store((sequence, head), rows, valid, keys, values, next_block)
        return rows

    def add_pairs(self, chosen: Tensor, index: tuple[Tensor, Tensor], keys: Tensor, values: Tensor) -> Tensor:
        """Add one token [n, h'] for each of n pairs of sequence and head, ``chosen`` in [B, E]; return their rows."""
        assert self.counts is not None and self.totals is not None
        self.reserve_one(keys)
        rows = self.counts[index]  # [n]
        self.store(index, rows, None, keys, values, self.totals[0])
        self.add_to_counts(chosen)
        return rows

    def read(self, index: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values of pairs [n, rows, h'], or all [B, E, rows, h']; ignore rows beyond a pair's count."""
        assert self.table is not None and self.keys is not None and self.values is not None
        columns = slice(0, -(-self.host_totals()[1] // BLOCK))
        blocks = self.table[:, :, columns] if index is None else self.table[(*index, columns)]
        return self.keys[blocks].flatten(-3, -2), self.values[blocks].flatten(-3, -2)

    def select_sequences(self, indices: Tensor) -> None:
        """Keep these sequences of the batch, in this order; each gets its own copy of its blocks."""
        if self.counts is None or self.table is None or self.keys is None or self.values is None:
            return
        self.counts, table = self.counts[indices], self.table[indices]
        used = torch.arange(table.shape[2], device=table.device) < (self.counts[..., None] + BLOCK - 1) // BLOCK
        blocks = torch.cat((table.new_zeros(1), table[used]))  # old numbers, block 0 first
        self.keys, self.values = self.keys[blocks], self.values[blocks]
        self.table = torch.zeros_like(table)
        self.table[used] = torch.arange(1, len(blocks), device=table.device)
        full = self.counts % BLOCK == 0
        self.set_totals(torch.stack((full.new_full((), len(blocks), dtype=torch.long), self.counts.max(), full.sum())))

    def used_rows(self) -> int:
        return 0 if self.counts is None else int(self.counts.sum())
