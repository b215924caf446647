"""Documents packed into sequences, and causal attention within them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.kernels.flash import flash_attention, has_flash


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of B packed sequences of T tokens.

    Documents are contiguous, so an earlier token belongs to the same document as a token if and only if its position is
    at least the token's ``starts``.
    """

    starts: Tensor
    """int64 [B, T], on the device of the activations: the position where each token's document begins."""

    lengths: tuple[tuple[int, ...], ...]
    """Lengths of the documents of each sequence, in order; on the host, so that shapes need no synchronization."""

    _selections: dict[Callable[[int], int], DocumentSelection] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def from_starts(starts: Tensor, device: torch.device | None = None) -> Documents:
        """Build from ``starts``, preferably on the CPU, because the host reads the lengths from it.

        Args:
            starts: int64 [B, T].
            device: device of the activations; None: that of ``starts``.

        Raises:
            ValueError: wrong type or rank, or not the starts of contiguous documents.
        """
        if starts.dim() != 2 or starts.dtype != torch.int64:
            raise ValueError(f"document starts are {starts.dtype} {tuple(starts.shape)}; expected torch.int64 [B, T]")
        host = starts.cpu()
        positions = torch.arange(host.shape[1], device=host.device).expand_as(host)
        begins = host == positions
        if not torch.equal(host, torch.where(begins, positions, 0).cummax(dim=1).values) or not begins[:, 0].all():
            raise ValueError(
                "document starts must be 0 for the first token, and for every other token the previous start or "
                "its own position"
            )
        bounds = [[*row.nonzero().flatten().tolist(), len(row)] for row in begins]
        lengths = tuple(tuple(end - start for start, end in pairwise(row)) for row in bounds)
        return Documents(starts.to(device or starts.device, non_blocking=True), lengths)

    @staticmethod
    def from_lengths(lengths: Sequence[Sequence[int]], device: torch.device | None = None) -> Documents:
        """Build from the lengths of each sequence's documents, at least 1, which have the same sum in every sequence.

        Raises:
            ValueError: they are other than that, or there are none.
        """
        try:
            rows = [[index(length) for length in row] for row in lengths]
        except TypeError:
            rows = []
        if not rows or len(set(map(sum, rows))) > 1 or min(chain.from_iterable(rows), default=0) < 1:
            raise ValueError(
                f"document lengths are {str(lengths)[:80]}; expected lengths of 1 or more with the same sum in every "
                "sequence"
            )
        bounds = [torch.tensor([0, *row]) for row in rows]
        starts = torch.stack([row.cumsum(0)[:-1].repeat_interleave(row[1:]) for row in bounds])
        return Documents(starts.to(device), tuple(map(tuple, rows)))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [N + 1]: cumulative lengths of all N documents of the batch, from 0 to B * T."""
        lengths = torch.tensor([0, *(length for row in self.lengths for length in row)], dtype=torch.int32)
        return lengths.cumsum(0, dtype=torch.int32).to(self.starts.device)

    @property
    def max_seqlen(self) -> int:
        """Length of the longest document."""
        return max(map(max, self.lengths))

    @cached_property
    def positions(self) -> Tensor:
        """int64 [B, T]: each token's position in its document."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def packed(self, capacity: int) -> PackedDocuments:
        """Return the same as tensors whose shapes depend only on B, T and a number of documents of at least N."""
        number = self.starts.numel()
        cu_seqlens = F.pad(self.cu_seqlens, (0, capacity + 1 - len(self.cu_seqlens)), value=number)
        return PackedDocuments(self.starts, cu_seqlens, self.starts.shape[1])

    def strided(self, stride: int) -> Documents:
        """Return the documents of every ``stride``-th token; those without any disappear."""
        rows = []
        for lengths in self.lengths:
            bounds = [-(-end // stride) for end in accumulate(lengths, initial=0)]
            rows.append(tuple(end - start for start, end in pairwise(bounds) if end > start))
        return Documents(_strided_starts(self.starts, stride), tuple(rows))

    def selection(self, rule: Callable[[int], int]) -> DocumentSelection:
        """Apply a rule that says how many of a document's L tokens to select, from 1 to L; results are cached.

        Raises:
            ValueError: the rule returned something other than an integer from 1 to L.
        """
        if rule not in self._selections:
            lengths = list(chain.from_iterable(self.lengths))
            counts = [[rule(length) for length in row] for row in self.lengths]
            for length, count in zip(lengths, chain.from_iterable(counts), strict=True):
                if count is None or isinstance(count, bool | float | str) or not 1 <= count <= length:
                    raise ValueError(
                        f"{count!r} of {length} tokens of a document cannot be selected; expected an integer from 1 to "
                        f"{length}"
                    )
            flat = torch.tensor(list(chain.from_iterable(counts)))
            quotas = flat.repeat_interleave(torch.tensor(lengths)).view(self.starts.shape)
            num_slots = max(map(sum, counts))
            slots = [[*row, num_slots - sum(row)] if sum(row) < num_slots else row for row in counts]
            device = self.starts.device
            self._selections[rule] = DocumentSelection(quotas.to(device), Documents.from_lengths(slots, device))
        return self._selections[rule]


@dataclass(frozen=True)
class DocumentSelection:
    """How many tokens every head selects from each document."""

    quotas: Tensor
    """int64 [B, T]: number of tokens to select from each token's document."""

    slots: Documents
    """The k slots of each sequence as packed documents; empty slots at the end form one more document."""

    @property
    def num_slots(self) -> int:
        """k: the largest number of selected tokens of any sequence."""
        return self.slots.starts.shape[1]


class PackedDocuments(NamedTuple):
    """``Documents`` for compiled layers and CUDA graphs, in which nothing is known to the host but shapes."""

    starts: Tensor
    """int64 [B, T]: as in ``Documents``."""

    cu_seqlens: Tensor
    """int32 [capacity + 1]: as in ``Documents``, then B * T: the remaining documents are empty."""

    max_seqlen: int
    """T, which no document exceeds."""

    def strided(self, stride: int) -> PackedDocuments:
        """Return the documents of every ``stride``-th token; those without any are empty."""
        length = self.starts.shape[1]
        starts = _strided_starts(self.starts, stride)
        sequence, position = self.cu_seqlens // length, self.cu_seqlens % length
        cu_seqlens = sequence * starts.shape[1] + (position + stride - 1) // stride
        return PackedDocuments(starts, cu_seqlens.to(torch.int32), starts.shape[1])


def _strided_starts(starts: Tensor, stride: int) -> Tensor:
    """Return for every ``stride``-th token the first such token of its document, counted in such tokens."""
    return ((starts[:, ::stride] + stride - 1) // stride).contiguous()


AnyDocuments = Documents | PackedDocuments


def document_attention(query: Tensor, key: Tensor, value: Tensor, documents: AnyDocuments) -> Tensor:
    """Causal attention within documents, whose cost is that of separate short sequences.

    Uses variable-length flash attention where ``has_flash``, otherwise one call of SDPA per document, or for
    ``PackedDocuments`` one call with a T x T mask.

    Args:
        query: [B, H, T, h'].
        key, value: [B, G, T, h'], G dividing H.

    Returns:
        [B, H, T, h'].
    """
    if has_flash(query):
        return flash_attention(query, key, value, documents.cu_seqlens, documents.max_seqlen)
    grouped = query.shape[1] != key.shape[1]
    if isinstance(documents, PackedDocuments):
        positions = torch.arange(query.shape[2], device=query.device)
        visible = (positions <= positions[:, None]) & (positions >= documents.starts[:, :, None])  # [B, T, T]
        return F.scaled_dot_product_attention(query, key, value, visible[:, None], enable_gqa=grouped)
    rows = []
    for number, lengths in enumerate(documents.lengths):
        parts = zip(*(states[number].split(list(lengths), dim=-2) for states in (query, key, value)), strict=True)
        # [1, H | G, length, h'] each
        attended = [
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=grouped)
            for q, k, v in parts
        ]
        rows.append(torch.cat(attended, dim=-2))
    return torch.cat(rows)
