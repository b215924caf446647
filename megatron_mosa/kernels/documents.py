"""Documents packed into sequences: where they begin, and causal attention that stays inside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.kernels.flash import flash_attention, has_flash


@dataclass(frozen=True)
class Documents:
    """The documents of B packed sequences of T tokens.

    A token belongs to the document that begins at its ``starts``; since documents are contiguous, an earlier token is
    of the same document exactly if it does not lie before that.
    """

    starts: Tensor
    """int64 [B, T], on the device of the activations: position where the token's document begins."""

    lengths: tuple[tuple[int, ...], ...]
    """Tokens in each document of each sequence, in order; known to the host, so that no shape waits for a device."""

    _selections: dict[Callable[[int], int], DocumentSelection] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def from_starts(starts: Tensor, device: torch.device | None = None) -> Documents:
        """From ``starts`` alone, best on the CPU: the lengths are read on the host.

        Args:
            starts: int64 [B, T].
            device: where the activations are; None: where ``starts`` is.

        Raises:
            ValueError: not of that type and rank, or not the starts of contiguous documents.
        """
        if starts.dim() != 2 or starts.dtype != torch.int64:
            raise ValueError(f"document starts are {starts.dtype} {tuple(starts.shape)}; expected torch.int64 [B, T]")
        host = starts.cpu()
        positions = torch.arange(host.shape[1]).expand_as(host)
        begins = host == positions
        if not torch.equal(host, torch.where(begins, positions, 0).cummax(dim=1).values) or not begins[:, 0].all():
            raise ValueError("document starts must be 0 at first, and then stay or jump to the token's own position")
        bounds = [[*row.nonzero().flatten().tolist(), len(row)] for row in begins]
        lengths = tuple(tuple(end - start for start, end in pairwise(row)) for row in bounds)
        return Documents(starts.to(device or starts.device, non_blocking=True), lengths)

    @staticmethod
    def from_lengths(lengths: Sequence[Sequence[int]], device: torch.device | None = None) -> Documents:
        """From the lengths of each sequence's documents, whose sums are equal."""
        rows = [torch.tensor([0, *row]) for row in lengths]
        starts = torch.stack([row.cumsum(0)[:-1].repeat_interleave(row[1:]) for row in rows])
        return Documents(starts.to(device), tuple(map(tuple, lengths)))

    @cached_property
    def boundaries(self) -> Tensor:
        """int32 [N + 1]: where the documents of the flattened batch, [B * T], begin; then B * T."""
        lengths = torch.tensor([0, *(length for row in self.lengths for length in row)], dtype=torch.int32)
        return lengths.cumsum(0, dtype=torch.int32).to(self.starts.device)

    @property
    def longest(self) -> int:
        """Tokens in the longest document."""
        return max(map(max, self.lengths))

    @cached_property
    def positions(self) -> Tensor:
        """int64 [B, T]: each token's position in its document."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.starts

    def selection(self, rule: Callable[[int], int]) -> DocumentSelection:
        """How many tokens to select of each document, by a rule of its length L that gives 1 to L.

        Raises:
            ValueError: the rule gives another number.
        """
        if rule not in self._selections:
            lengths = list(chain.from_iterable(self.lengths))
            counts = [[rule(length) for length in row] for row in self.lengths]
            for length, count in zip(lengths, chain.from_iterable(counts), strict=True):
                if not 1 <= count <= length:
                    raise ValueError(
                        f"{count} of {length} tokens of a document cannot be selected; expected 1 to {length}"
                    )
            flat = torch.tensor(list(chain.from_iterable(counts)))
            quotas = flat.repeat_interleave(torch.tensor(lengths)).view(self.starts.shape)
            most = max(map(sum, counts))
            slots = [[*row, most - sum(row)] if sum(row) < most else row for row in counts]
            device = self.starts.device
            self._selections[rule] = DocumentSelection(quotas.to(device), Documents.from_lengths(slots, device))
        return self._selections[rule]


@dataclass(frozen=True)
class DocumentSelection:
    """What is selected of each document, the same number by every head."""

    quotas: Tensor
    """int64 [B, T]: tokens to select of each token's document."""

    slots: Documents
    """The selected tokens, [B, k], as packed sequences themselves; empty slots at the end are one document more."""

    @property
    def num_slots(self) -> int:
        """k, the largest sum of quotas over the documents of a sequence."""
        return self.slots.starts.shape[1]


def document_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """Causal attention of every token to its own document; the work and memory of short sequences.

    Flash attention of variable length where it is there, one call of SDPA a document elsewhere.

    Args:
        query: [B, H, T, h'].
        key, value: [B, G, T, h'], G dividing H.

    Returns:
        [B, H, T, h'].
    """
    if has_flash(query):
        return flash_attention(query, key, value, documents.boundaries, documents.longest)
    grouped = query.shape[1] != key.shape[1]
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
