"""Load a model from any kind of checkpoint for evaluation in a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.convert import ModelReader, load_weights, single_process_groups
from megatron_mosa.kernels import Documents
from megatron_mosa.model import build_empty_model, calibration_config

_BLOCK = 8192  # tokens per block of the cross entropy: fp32 logits of a whole batch would dominate memory


class EvaluationModel:
    """A GPTModel that computes losses without gradients."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device

    @torch.no_grad()
    def losses(self, tokens: Tensor, labels: Tensor, starts: Tensor | None = None) -> Tensor:
        """Compute the cross entropy of each token's successor in nats, fp32 [B, T] on the CPU.

        Args:
            tokens: int64 [B, T].
            labels: int64 [B, T].
            starts: start position of each token's document, int64 [B, T], for a model that attends within documents.
        """
        logits = self._logits(tokens, starts).flatten(0, 1)  # [B * T, V]
        expected = labels.to(self.device).flatten()
        blocks = zip(logits.split(_BLOCK), expected.split(_BLOCK), strict=True)
        losses = [F.cross_entropy(x.float(), y, reduction="none") for x, y in blocks]
        return torch.cat(losses).view(labels.shape).cpu()

    @torch.no_grad()
    def forward(self, tokens: Tensor, starts: Tensor | None = None) -> None:
        """Run the model only for what its layers record, such as selections."""
        self._logits(tokens, starts)

    def _logits(self, tokens: Tensor, starts: Tensor | None) -> Tensor:
        documents = None if starts is None else Documents.from_starts(starts, self.device)
        tokens = tokens.to(self.device)
        return self.module(tokens, torch.arange(tokens.shape[1], device=self.device).expand_as(tokens), documents)


@contextmanager
def evaluation_model(
    model: ModelReader, device: torch.device, dtype: torch.dtype, *, calibrates: bool
) -> Iterator[EvaluationModel]:
    """Build the model with its weights on a device.

    Args:
        model: an opened checkpoint.
        device: device to compute on.
        dtype: dtype to compute in.
        calibrates: MoSA heads select by thresholds, which the caller must calibrate, and not as in training.
    """
    config = model.config
    if calibrates:  # load feedback that the heads are trained with belongs to their selection
        config = calibration_config(config, config.mosa.load_feedback or 0.0)
    config = replace(config, mosa=replace(config.mosa, backend="auto"))
    with single_process_groups(config):
        module = build_empty_model(config, model.vocab_rows).eval()
        load_weights(module, model.read, {weight.name for weight in model.weights})
        yield EvaluationModel(module.to(device=device, dtype=dtype), device)
