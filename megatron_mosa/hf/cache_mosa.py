"""Keys and values that decoding keeps: every token of dense heads, a window of local ones, MoSA heads' selected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_mosa import MosaConfig

STEP = 16  # rows that a buffer grows by at least


class Rows:
    """Keys and values of one kind of heads, [B, heads, rows + 1, h'] each; the last row takes what is to be dropped."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

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

    def tensors(self) -> list[Tensor]:
        """What is allocated."""
        return [tensor for tensor in (self.keys, self.values) if tensor is not None]

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (part.index_select(0, sequences) for part in (self.keys, self.values))

    def used_rows(self) -> int:
        """Rows in use, over heads and sequences."""
        raise NotImplementedError

    def bytes(self) -> tuple[int, int]:
        """Bytes allocated, and of them in use."""
        allocated = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())
        if self.keys is None:
            return 0, 0
        return allocated, 2 * self.used_rows() * self.keys.shape[3] * self.keys.element_size()


class DenseRows(Rows):
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


class WindowRows(Rows):
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
        self.keys[sequence, head, rows] = keys
        self.values[sequence, head, rows] = values

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
    """The tokens that each head selected of each sequence, packed: the n-th of them in row n, whatever its position.

    The buffer is as long as the largest count of a head and sequence. How large that is the host knows up to a few
    rows too many: it asks the device every ``STEP`` tokens alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Tensor | None = None  # [B, E]
        self.bound = 0  # no count is larger
        self.asked = 0  # the largest count when the device was last asked

    def reserve(self, like: Tensor, largest: int | None = None) -> int:
        """Make room before tokens are written; keys are like [B, E, n, h'].

        Args:
            largest: of the counts after it; None: one more than any count now.

        Returns:
            rows that hold everything then.
        """
        if self.counts is None:
            self.counts = torch.zeros(like.shape[:2], dtype=torch.long, device=like.device)
        if largest is not None:
            self.bound = self.asked = largest
        elif self.bound + 1 > min(self.rows, self.asked + STEP):
            self.asked = int(self.counts.max())
            self.bound = self.asked + 1
        else:
            self.bound += 1
        self.make_room(like, self.bound)
        return self.bound

    def write(self, index: tuple[Tensor, Tensor, Tensor], keys: Tensor, values: Tensor) -> None:
        """Put [..., h'] into rows named by sequence, head and row, [...] each; row ``rows`` drops."""
        assert self.keys is not None and self.values is not None
        self.keys[index] = keys
        self.values[index] = values

    def select(self, sequences: Tensor) -> None:
        """As Rows."""
        super().select(sequences)
        self.counts = None if self.counts is None else self.counts[sequences]

    def used_rows(self) -> int:
        """As Rows."""
        return 0 if self.counts is None else int(self.counts.sum())


class MosaCacheLayer(CacheLayerMixin):
    """What one layer keeps, by kind of heads; None: the model has none of the kind."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.length = 0  # columns of the input so far, padding included
        self.dense = DenseRows() if config.num_dense_heads else None
        self.local = WindowRows(config.local_window) if config.num_local_heads else None
        self.mosa = SelectedRows() if config.num_mosa_heads else None

    def parts(self) -> dict[str, Rows]:
        """By kind of heads."""
        every = {"dense": self.dense, "local": self.local, "mosa": self.mosa}
        return {kind: rows for kind, rows in every.items() if rows is not None}

    def get_seq_length(self) -> int:
        """Columns of the input so far, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask covers, and where they begin."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions of transformers

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        for name, rows in self.parts().items():
            setattr(self, name, WindowRows(rows.window) if isinstance(rows, WindowRows) else type(rows)())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue from other sequences of the batch, as beam search does."""
        for rows in self.parts().values():
            for tensor in rows.tensors()[:1]:
                rows.select(beam_idx.to(tensor.device))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        for rows in self.parts().values():
            for tensor in rows.tensors()[:1]:
                sequences = torch.arange(tensor.shape[0], device=tensor.device)
                rows.select(sequences.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: a window does not remember what went before it."""
        raise ValueError("a MosaCache cannot be cropped; legal: generation without drafts (assistant_model)")

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing: buffers are made when there is something to keep."""

    def update(self, *_: Any, **__: Any) -> Any:
        """Heads write into their own part."""
        raise NotImplementedError("heads of a MoSA model write into the parts of a MosaCacheLayer")


class MosaCache(Cache):
    """What decoding keeps of the sequences of a batch, layer by layer; it grows as they do.

    Args:
        config: of the model that will fill it.
    """

    def __init__(self, config: MosaConfig) -> None:
        self.layers: list[MosaCacheLayer]
        super().__init__(layers=[MosaCacheLayer(config) for _ in range(config.num_hidden_layers)])  # pyright: ignore
        self.shape = cache_shape(config)
        self.batch: int | None = None  # sequences; None: nothing is in it
        self.padded = False  # an attention mask came with what is in it

    def bytes(self) -> dict[str, tuple[int, int]]:
        """Bytes allocated, and of them in use, by kind of heads, over all layers."""
        sums: dict[str, tuple[int, int]] = {}
        for layer in self.layers:
            for kind, rows in layer.parts().items():
                allocated, used = rows.bytes()
                before = sums.get(kind, (0, 0))
                sums[kind] = before[0] + allocated, before[1] + used
        return sums

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.batch, self.padded = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue from other sequences of the batch."""
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self.batch = len(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        super().batch_select_indices(indices)
        self.batch = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self.batch = None if self.batch is None else self.batch * repeats


def cache_shape(config: MosaConfig) -> dict[str, int]:
    """What a cache must have in common with the model that reads it."""
    names = (
        "num_hidden_layers",
        "head_dim",
        "num_key_value_heads",
        "num_local_heads",
        "local_window",
        "num_mosa_heads",
    )
    return {name: getattr(config, name) for name in names}
