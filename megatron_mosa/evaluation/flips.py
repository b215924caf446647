"""How often the selection of a token depends on what comes after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mosa.attention.thresholds import mosa_layers
from megatron_mosa.data import ValidationSamples
from megatron_mosa.evaluation.losses import Tick, batches
from megatron_mosa.evaluation.model import Evaluated
from megatron_mosa.metrics.selection import recorded_selection


def flip_rates(
    model: Evaluated, samples: ValidationSamples, positions: Sequence[int], tokens_at_once: int, tick: Tick
) -> Tensor:
    """Share of selections up to a position that are not there when all tokens after it are others; [positions].

    The others are those of the next sample. Of selections with the one future and with the other, those with one alone
    count: 0 if nothing changes, 1 if nothing stays. Over all layers, heads and samples.
    """
    one_sided, both = torch.zeros(2, len(positions), dtype=torch.int64)
    with recorded_selection(model.module):
        for batch in batches(samples, tokens_at_once):
            tokens, starts = batch["tokens"], batch.get("document_starts")
            if len(tokens) == 1:
                others = samples[1 if torch.equal(tokens[0], samples[0]["tokens"]) else 0]["tokens"].unsqueeze(0)
            else:
                others = tokens.roll(1, dims=0)
            first = _selections(model, tokens, starts)
            tick(tokens.numel())
            for number, position in enumerate(positions):
                changed = torch.cat((tokens[:, : position + 1], others[:, position + 1 :]), dim=1)
                for before, after in zip(first, _selections(model, changed, starts), strict=True):
                    before, after = before[..., : position + 1], after[..., : position + 1]
                    one_sided[number] += (before ^ after).sum().item()
                    both[number] += (before.sum() + after.sum()).item()
                tick(tokens.numel())
    return one_sided.double() / both


def _selections(model: Evaluated, tokens: Tensor, starts: Tensor | None) -> list[Tensor]:
    """Whether each head takes each token, bool [B, E, T], layer by layer."""
    model.forward(tokens, starts)
    found = []
    for layer in mosa_layers(model.module):
        assert layer.selection is not None
        scores, indices = layer.selection
        length = scores.shape[-1]
        taken = torch.zeros(*scores.shape[:-1], length + 1, dtype=torch.bool, device=scores.device)
        found.append(taken.scatter_(-1, indices, True)[..., :length])
        layer.selection = None
    return found
