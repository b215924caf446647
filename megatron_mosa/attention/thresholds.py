"""Thresholds of MoSA heads: each follows the quantile of its head's scores that keeps the head's load at 1 / rho.

A token is taken if its score is above the threshold, so that membership depends on the token and on the past of the
training run alone: causal. docs/causal.md says why, and what is measured.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_mosa.attention.heads import THRESHOLD_BUFFERS, MosaHeads
from megatron_mosa.kernels import HISTOGRAM_LOGITS

DEAD, OVERLOADED = 0.5, 2.0  # loads below and above which a threshold does not wait for its average


def mosa_layers(model: torch.nn.Module) -> list[MosaHeads]:
    """The MoSA heads of each layer that has some, in depth order."""
    return [module for module in model.modules() if isinstance(module, MosaHeads)]


def threshold_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """The buffers that checkpoints keep, by name: thresholds and numbers of updates, fp32 [E / tp] each."""
    return {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in THRESHOLD_BUFFERS}


def is_causal(model: torch.nn.Module, *, training: bool = False) -> bool:
    """Whether no head looks ahead: there are no MoSA heads, or all select by thresholds.

    In evaluation they do so as soon as these were updated once, in ``training`` after the warm-up.
    """
    return all(heads.selects_above(training) for heads in mosa_layers(model))


@torch.no_grad()
def update_thresholds(model: torch.nn.Module, group: dist.ProcessGroup | None) -> None:
    """Let the thresholds follow the scores that were counted since the last call; after each optimizer step.

    The new threshold is a moving average: the old one moves to the quantile of the batch by a share of
    ``mosa_threshold_ema``, or 1 / (n + 1) in update n = 0, 1, ... if that is more. Where the old one would load the
    head below ``DEAD`` or above ``OVERLOADED`` times its target, the new one is the quantile itself. ``MosaHeads.load``
    tells these loads. Collective over ``group``; counts are integers, so that nothing depends on its size.

    Args:
        model: any module with MoSA layers that were called in training mode since.
        group: the ranks that have seen different parts of the batch; None: all of it was seen here.
    """
    layers = [heads for heads in mosa_layers(model) if heads.config.mosa_selection == "threshold"]
    if not layers:
        return
    counts = torch.stack([heads.histogram for heads in layers])  # [L, E / tp, bins]
    if group is not None:
        dist.all_reduce(counts, group=group)
    old = torch.stack([heads.thresholds for heads in layers]).double()  # [L, E / tp]
    updates = torch.stack([heads.threshold_updates for heads in layers]).double()
    config = layers[0].config
    quantile = quantile_of(counts, 1 / config.mosa_sparsity)
    load = config.mosa_sparsity * share_above(counts, torch.where(updates == 0, quantile, old))
    average = old + (1 / (updates + 1)).clamp(min=config.mosa_threshold_ema) * (quantile - old)
    new = torch.where((load < DEAD) | (load > OVERLOADED), quantile, average)
    for heads, thresholds, loads in zip(layers, new, load, strict=True):
        heads.update(thresholds, loads.float())


def forget_scores(model: torch.nn.Module) -> None:
    """Drop what was counted since the last update: after a step that was skipped."""
    for heads in mosa_layers(model):
        if heads.config.mosa_selection == "threshold":
            heads.histogram.zero_()


def quantile_of(counts: Tensor, share: float) -> Tensor:
    """The score that a share of the counted scores is above, linearly interpolated in its bin (of logits).

    Args:
        counts: integers [..., bins], as ``kernels.naive.count_scores`` makes them, not all 0.
        share: above 0, up to 1.

    Returns:
        fp64 [...].
    """
    bins = counts.shape[-1]
    reached = _reached(counts)  # [..., bins]
    wanted = share * reached[..., :1].double()
    place = (reached >= wanted).sum(dim=-1, keepdim=True) - 1  # the last bin that as many reach
    here = counts.gather(-1, place).double()
    inside = (wanted - (reached.gather(-1, place) - here)) / here  # share of the bin that is above
    logits = (place + 1 - inside) * (2 * HISTOGRAM_LOGITS / bins) - HISTOGRAM_LOGITS
    return logits.squeeze(-1).sigmoid()


def share_above(counts: Tensor, thresholds: Tensor) -> Tensor:
    """The share of the counted scores [..., bins] that is above thresholds [...]: the inverse; fp64 [...]."""
    bins = counts.shape[-1]
    place = (torch.logit(thresholds.double()) + HISTOGRAM_LOGITS) * (bins / (2 * HISTOGRAM_LOGITS))
    place = place.clamp(0, bins).unsqueeze(-1)  # [..., 1]
    bin_ = place.long().clamp(max=bins - 1)
    reached, here = _reached(counts), counts.gather(-1, bin_)
    above = reached.gather(-1, bin_) - here + here * (bin_ + 1 - place)
    return (above / reached[..., :1]).squeeze(-1)


def _reached(counts: Tensor) -> Tensor:
    """How many scores lie in each bin or above it."""
    return counts.flip(-1).cumsum(dim=-1, dtype=torch.int64).flip(-1)
