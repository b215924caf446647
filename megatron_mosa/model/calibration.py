"""Thresholds for a model that was trained with expert choice, found from its scores on text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from megatron_mosa.attention import update_thresholds
from megatron_mosa.config import Config

CALIBRATION_PASSES = 2


def calibration_config(config: Config, load_feedback: float = 0.0) -> Config:
    """Return the configuration of a model to calibrate.

    Its thresholds are the quantiles of the last pass over the text. The capacity is twice the sequence length, so that
    it drops no token.
    """
    mosa = replace(
        config.mosa, selection="threshold", include_first_token=True, threshold_warmup_steps=1, threshold_ema=1.0,
        capacity_factor=2 * config.mosa.sparsity, load_feedback=load_feedback,
    )  # fmt: skip
    return replace(config, mosa=mosa)


@torch.no_grad()
def calibrate(model: torch.nn.Module, run_over_text: Callable[[], object]) -> None:
    """Set each threshold to the (1 - 1 / rho) quantile of its head's scores.

    The first pass selects by expert choice, the second by the thresholds of the first, so that the final thresholds of
    a layer fit the outputs of the layers below it.

    Args:
        model: a model of ``calibration_config``; left in evaluation mode.
        run_over_text: calls the model on all of the text; called once per pass.
    """
    model.train()  # only training mode counts scores
    for _ in range(CALIBRATION_PASSES):
        run_over_text()
        update_thresholds(model, None)
    model.eval()
