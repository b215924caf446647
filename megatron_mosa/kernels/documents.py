"""Documents packed into sequences: where they begin, and causal attention that stays inside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

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
    """Tokens in each document of each sequence, in order; known to the host, so that nothing waits for a device."""

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
            raise ValueError(f"document starts are {starts.dtype} {tuple(starts.shape)}; legal: torch.int64 [B, T]")
        host = starts.cpu()
        positions = torch.arange(host.shape[1]).expand_as(host)
        begins = host == positions
        if not torch.equal(host, torch.where(begins, positions, 0).cummax(dim=1).values) or not begins[:, 0].all():
            raise ValueError("document starts must be 0 at first, and then stay or jump to the token's own position")
        bounds = [[*row.nonzero().flatten().tolist(), len(row)] for row in begins]
        lengths = tuple(tuple(end - start for start, end in pairwise(row)) for row in bounds)
        return Documents(starts.to(device or starts.device, non_blocking=True), lengths)

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

    def quotas(self, rule: Callable[[int], int]) -> tuple[Tensor, int]:
        """How many tokens to select of each document, by a rule of its length.

        Returns:
            int64 [B, T], the quota of each token's document; and the largest sum over a sequence's documents.
        """
        counts = [[rule(length) for length in row] for row in self.lengths]
        lengths = torch.tensor([length for row in self.lengths for length in row])
        tokens = torch.tensor([count for row in counts for count in row]).repeat_interleave(lengths)  # [B * T]
        return tokens.view(self.starts.shape).to(self.starts.device), max(map(sum, counts))


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
