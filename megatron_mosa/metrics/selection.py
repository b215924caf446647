"""Statistics of what the MoSA heads of each layer select."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from megatron_mosa.attention import DEAD, OVERLOADED, mosa_layers


@contextmanager
def recorded_selection(model: torch.nn.Module) -> Iterator[None]:
    """Make every MoSA layer keep the scores and indices of its last forward pass."""
    layers = mosa_layers(model)
    for layer in layers:
        layer.records_selection = True
    try:
        yield
    finally:
        for layer in layers:
            layer.records_selection = False


@torch.no_grad()
def selection_statistics(model: torch.nn.Module) -> dict[str, list[Any]]:
    """Return statistics per layer, over the heads of all tensor-parallel ranks and the last recorded forward pass.

    With compiled layers that is one sequence, otherwise the last micro-batch.

    A collective over the tensor-parallel group.

    Returns:
        ``selected_score_mean``: mean router score of the selected tokens.
        ``unselected_share``: share of the tokens that no head selects.
        For heads with thresholds, also the entries of ``_threshold_statistics``.
    """
    means, shares = [], []
    threshold_statistics = _threshold_statistics(model)
    for layer in mosa_layers(model):
        if layer.selection is None:
            continue
        scores, indices = layer.selection  # [B, E, T], [B, E, k]
        scores = F.pad(scores, (0, 1), value=torch.nan)  # empty slots hold T
        chosen = scores.gather(-1, indices).double()
        total = torch.stack((chosen.nansum(), (~chosen.isnan()).sum()))  # ranks may select different numbers of tokens
        taken = torch.zeros_like(scores[:, 0], dtype=torch.int32)  # [B, T + 1]
        taken = taken.scatter_(1, indices.flatten(1), 1)[:, :-1].contiguous()  # [B, T]
        dist.all_reduce(total, group=layer.tp_group)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=layer.tp_group)
        means.append((total[0] / total[1]).item())
        shares.append(1.0 - taken.float().mean().item())
        layer.selection = None
    return {"selected_score_mean": means, "unselected_share": shares} | threshold_statistics


def _threshold_statistics(model: torch.nn.Module) -> dict[str, list[Any]]:
    """Return statistics per layer of heads whose thresholds were updated.

    Returns:
        ``selection_load``: share of the last step's tokens (of the global batch) above their head's threshold in that
            step, divided by 1 / rho; mean over heads. ``_min``, ``_max``: over heads.
        ``dead_heads``, ``overloaded_heads``: number of heads whose load is below 0.5, and above 2.
        ``overflow_share``: share of the selected tokens of the last recorded forward pass that the capacity dropped; 0
            in the warm-up, which does not select by threshold. ``_max``: over heads.
        ``load_of_heads``, ``overflow_of_heads``: the same for every head, one list per layer.
    """
    found: dict[str, list[Any]] = {}
    for layer in mosa_layers(model):
        if layer.load is None or layer.selection is None or layer.dropped is None:
            continue
        scores, indices = layer.selection  # [B, E / tp, T], [B, E / tp, k]
        taken = (indices < scores.shape[-1]).sum((0, 2))
        load, taken, dropped = _gather_heads(torch.stack((layer.load, taken, layer.dropped)), layer.tp_group)
        overflow = dropped / (taken + dropped)
        values = {
            "selection_load": load.mean().item(),
            "selection_load_min": load.min().item(),
            "selection_load_max": load.max().item(),
            "overflow_share": (dropped.sum() / (taken + dropped).sum()).item(),
            "overflow_share_max": overflow.max().item(),
            "dead_heads": int((load < DEAD).sum()),
            "overloaded_heads": int((load > OVERLOADED).sum()),
            "load_of_heads": load.tolist(),
            "overflow_of_heads": overflow.tolist(),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def _gather_heads(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [n, E] from each rank's [n, E / tp], by a sum, which every backend supports on every device."""
    own, count = group.rank(), values.shape[1]
    whole = torch.zeros(len(values), group.size() * count, dtype=torch.float64, device=values.device)
    whole[:, own * count : (own + 1) * count] = values
    dist.all_reduce(whole, group=group)
    return whole
