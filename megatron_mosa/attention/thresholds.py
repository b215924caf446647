"""Thresholds of MoSA heads: each follows the quantile of its head's scores that keeps the head's load at 1 / rho.

A token is selected if its score is above the threshold. The threshold depends only on past steps of the training run,
so the selection is causal. docs/causal.md has the reasons and measurements. Biases of token choice and centroids of
Routing heads are updated here, too, at the same time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_mosa.attention.heads import SELECTION_BUFFERS, PartitionedHeads
from megatron_mosa.attention.mosa_heads import MosaHeads
from megatron_mosa.attention.routing_heads import RoutingHeads
from megatron_mosa.attention.token_choice import balanced
from megatron_mosa.kernels import HISTOGRAM_LOGITS

DEAD, OVERLOADED = 0.5, 2.0  # loads beyond which a threshold jumps to the quantile instead of moving towards it


def mosa_layers(model: torch.nn.Module) -> list[MosaHeads]:
    """Return the MoSA heads of all layers that have some, in depth order."""
    return [module for module in model.modules() if isinstance(module, MosaHeads)]


def selection_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return what heads select by besides their weights, by name, fp32 [E / tp, ...] each; checkpoints contain it.

    Thresholds and the numbers of their updates, or the biases of token choice; the centroids of Routing heads.
    """
    return {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in SELECTION_BUFFERS}


def is_causal(model: torch.nn.Module, *, training: bool = False) -> bool:
    """Return whether no output depends on later tokens: no heads look ahead, as MoSA heads do by expert choice.

    With thresholds they are causal in evaluation after the first update, in ``training`` after the warm-up.
    """
    return all(heads.is_causal(training) for heads in model.modules() if isinstance(heads, PartitionedHeads))


@torch.no_grad()
def update_thresholds(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
    """Update thresholds, biases of token choice and centroids, by what was counted since the last call.

    Call it after each optimizer step.

    A threshold is a moving average: it moves towards the quantile of the batch with weight ``mosa_threshold_ema``, or
    1 / (n + 1) in update n = 0, 1, ... if that is larger. If the head's load under the old threshold is below ``DEAD``
    or above ``OVERLOADED`` times its target, the new threshold is the quantile itself. ``MosaHeads.load`` holds these
    loads. Heads that have counted no score keep their thresholds. A collective over ``group``. Counts are integers, so
    the result does not depend on the size of the group; centroids do by rounding, since they are made of sums.

    Args:
        model: a module with MoSA layers, which ran in training mode since the last call.
        group: the ranks that processed different parts of the batch; None: this process processed all of it.
    """
    _update_biases(model, group)
    _update_centroids(model, group)
    layers = [heads for heads in mosa_layers(model) if heads.config.mosa_selection == "threshold"]
    if not layers:
        return
    counts = torch.stack([heads.histogram for heads in layers])  # [L, E / tp, bins]
    if group is not None:
        dist.all_reduce(counts, group=group)
    counted = counts.any(dim=-1)  # [L, E / tp]
    if not layers[0].selects_above(training=False) and not counted.all():  # waits only before the first update
        return
    old = torch.stack([heads.thresholds for heads in layers]).double()  # [L, E / tp]
    updates = torch.stack([heads.threshold_updates for heads in layers]).double()
    config = layers[0].config
    quantile = quantile_of(counts, 1 / config.mosa_sparsity)
    load = config.mosa_sparsity * share_above(counts, torch.where(updates == 0, quantile, old))
    average = old + (1 / (updates + 1)).clamp(min=config.mosa_threshold_ema) * (quantile - old)
    new = torch.where((load < DEAD) | (load > OVERLOADED), quantile, average)
    new = torch.where(counted, new, old)
    for heads, thresholds, loads in zip(layers, new, load, strict=True):
        heads.update(thresholds, loads.float())


def _update_biases(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
    layers = [heads for heads in mosa_layers(model) if heads.config.mosa_selection == "token_choice"]
    if not layers:
        return
    config = layers[0].config
    counts = torch.stack([heads.choices for heads in layers])  # [L, E / tp + 1]
    if group is not None:
        dist.all_reduce(counts, group=group)
    taken, target = counts[:, :-1].double(), counts[:, -1:].double() * config.heads_per_token / config.num_mosa_heads
    for heads, own, expected in zip(layers, taken, target, strict=True):
        heads.head_bias.copy_(balanced(heads.head_bias, own, expected, config.mosa_balance_rate))
        heads.choices.zero_()
        heads.load = (own / expected).float()


def routing_layers(model: torch.nn.Module) -> list[RoutingHeads]:
    """Return the Routing heads of all layers that have some, in depth order."""
    return [module for module in model.modules() if isinstance(module, RoutingHeads)]


def _update_centroids(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
    layers = routing_layers(model)
    if not layers:
        return
    sums = torch.stack([heads.cluster_sums for heads in layers])  # [L, H / tp, rho, h' + 1]
    if group is not None:
        dist.all_reduce(sums, group=group)
    for heads, own in zip(layers, sums, strict=True):
        heads.update(own)


def forget_scores(model: torch.nn.Module) -> None:
    """Discard what was counted since the last update; call it after a skipped step."""
    for heads in mosa_layers(model):
        if heads.config.mosa_selection == "threshold":
            heads.histogram.zero_()
        elif heads.config.mosa_selection == "token_choice":
            heads.choices.zero_()
    for heads in routing_layers(model):
        heads.cluster_sums.zero_()


def quantile_of(counts: Tensor, share: float) -> Tensor:
    """Return the score above which a share of the counted scores lies, interpolated linearly in logits in its bin.

    Args:
        counts: integers [..., bins] from ``kernels.naive.count_scores``, not all 0.
        share: greater than 0 and at most 1.

    Returns:
        fp64 [...].
    """
    bins = counts.shape[-1]
    at_or_above = _count_at_or_above(counts)  # [..., bins]
    target = share * at_or_above[..., :1].double()
    index = (at_or_above >= target).sum(dim=-1, keepdim=True) - 1  # the last bin with that many scores at or above it
    count = counts.gather(-1, index).double()
    fraction = (target - (at_or_above.gather(-1, index) - count)) / count  # of the bin, that lies above the quantile
    logits = (index + 1 - fraction) * (2 * HISTOGRAM_LOGITS / bins) - HISTOGRAM_LOGITS
    return logits.squeeze(-1).sigmoid()


def share_above(counts: Tensor, thresholds: Tensor) -> Tensor:
    """Return the share of the counted scores above thresholds [...], the inverse of ``quantile_of``: fp64 [...]."""
    bins = counts.shape[-1]
    position = (torch.logit(thresholds.double()) + HISTOGRAM_LOGITS) * (bins / (2 * HISTOGRAM_LOGITS))
    position = position.clamp(0, bins).unsqueeze(-1)  # [..., 1], in bins
    index = position.long().clamp(max=bins - 1)
    at_or_above, count = _count_at_or_above(counts), counts.gather(-1, index)
    above = at_or_above.gather(-1, index) - count + count * (index + 1 - position)
    return (above / at_or_above[..., :1]).squeeze(-1)


def _count_at_or_above(counts: Tensor) -> Tensor:
    """Return the number of scores in each bin and all bins above it."""
    return counts.flip(-1).cumsum(dim=-1, dtype=torch.int64).flip(-1)
