"""What the MoSA heads of each layer select."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch.nn import functional as F

from megatron_mosa.attention.heads import MosaHeads


@contextmanager
def recorded_selection(model: torch.nn.Module) -> Iterator[None]:
    """Let every MoSA layer keep the scores and indices of its last forward pass."""
    layers = mosa_layers(model)
    for layer in layers:
        layer.records_selection = True
    try:
        yield
    finally:
        for layer in layers:
            layer.records_selection = False


def mosa_layers(model: torch.nn.Module) -> list[MosaHeads]:
    """The MoSA heads of each layer that has some, in depth order."""
    return [module for module in model.modules() if isinstance(module, MosaHeads)]


@torch.no_grad()
def selection_statistics(model: torch.nn.Module) -> dict[str, list[float]]:
    """Per layer, over the heads of all tensor-parallel ranks and the last recorded micro-batch.

    A collective over the tensor-parallel group.

    Returns:
        ``selected_score_mean``: mean router score of the selected tokens.
        ``unselected_share``: share of the tokens that no head takes.
    """
    means, shares = [], []
    for layer in mosa_layers(model):
        if layer.selection is None:
            continue
        scores, indices = layer.selection  # [B, E, T], [B, E, k]
        scores = F.pad(scores, (0, 1), value=torch.nan)  # empty places hold T
        mean = scores.gather(-1, indices).nanmean()
        taken = torch.zeros_like(scores[:, 0], dtype=torch.int32)  # [B, T + 1]
        taken = taken.scatter_(1, indices.flatten(1), 1)[:, :-1].contiguous()  # [B, T]
        dist.all_reduce(mean, group=layer.tp_group)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=layer.tp_group)
        means.append(mean.item() / layer.tp_group.size())
        shares.append(1.0 - taken.float().mean().item())
        layer.selection = None
    return {"selected_score_mean": means, "unselected_share": shares}
