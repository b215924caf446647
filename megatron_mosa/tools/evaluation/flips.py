"""Measure how often the selection of a token depends on later tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mosa.attention import mosa_layers
from megatron_mosa.data import ValidationSamples
from megatron_mosa.metrics import recorded_selection
from megatron_mosa.tools.evaluation.losses import ProgressCallback, batches
from megatron_mosa.tools.evaluation.model import EvaluationModel


def flip_rates(
    model: EvaluationModel,
    samples: ValidationSamples,
    positions: Sequence[int],
    tokens_at_once: int,
    tick: ProgressCallback,
) -> Tensor:
    """Return the share of selections up to each position that change if all later tokens are replaced, [positions].

    The replacements come from another sample. Of all selections made with the original and with the replaced future,
    the rate counts those made with only one of the two: 0 if nothing changes, 1 if no selection stays, NaN if there is
    none. It covers all layers, heads and samples.
    """
    changed_count, total_count = torch.zeros(2, len(positions), dtype=torch.int64)
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
                    changed_count[number] += (before ^ after).sum().item()
                    total_count[number] += (before.sum() + after.sum()).item()
                tick(tokens.numel())
    return changed_count.double() / total_count


def _selections(model: EvaluationModel, tokens: Tensor, starts: Tensor | None) -> list[Tensor]:
    """Return whether each head selects each token, bool [B, E, T], for each layer."""
    model.forward(tokens, starts)
    found = []
    for layer in mosa_layers(model.module):
        assert layer.selection is not None
        scores, indices = layer.selection
        length = scores.shape[-1]
        selected = torch.zeros(*scores.shape[:-1], length + 1, dtype=torch.bool, device=scores.device)
        found.append(selected.scatter_(-1, indices, True)[..., :length])
        layer.selection = None
    return found
