"""Thresholds for a model that was trained without: found by the scores that it gives to text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from megatron_mosa.attention import update_thresholds
from megatron_mosa.config import Config

PASSES = 2


def calibrating(config: Config, load_feedback: float = 0.0) -> Config:
    """A model with thresholds to be found: each is the quantile of the last pass, which no capacity disturbs."""
    mosa = replace(
        config.mosa, selection="threshold", include_first_token=True, threshold_warmup_steps=1, threshold_ema=1.0,
        capacity_factor=2 * config.mosa.sparsity, load_feedback=load_feedback,
    )  # fmt: skip
    return replace(config, mosa=mosa)


@torch.no_grad()
def calibrate(model: torch.nn.Module, go_over_text: Callable[[], object]) -> None:
    """Set the thresholds of a model that ``calibrating`` describes.

    Each becomes the (1 - 1 / rho) quantile of its head's scores: once as the model selects by expert choice, and then
    once more as it selects by these thresholds, so that every layer is calibrated to what those below it do.

    Args:
        model: left in evaluation mode.
        go_over_text: calls the model on all text; once for each pass.
    """
    model.train()  # scores are counted then
    for _ in range(PASSES):
        go_over_text()
        update_thresholds(model, None)
    model.eval()
