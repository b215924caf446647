"""A model of any kind of checkpoint, ready to be evaluated in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.checkpoint.logits import fill_model, one_process
from megatron_mosa.checkpoint.opened import Opened
from megatron_mosa.kernels import Documents
from megatron_mosa.model import build_empty_model
from megatron_mosa.model.calibration import calibrating

_BLOCK = 8192  # tokens whose cross entropy is computed at once: logits of all would be the largest tensor by far


class Evaluated:
    """A GPTModel without gradients, and the losses it gives."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device

    @torch.no_grad()
    def losses(self, tokens: Tensor, labels: Tensor, starts: Tensor | None = None) -> Tensor:
        """Cross entropy of each token's successor in nats, fp32 [B, T] on the CPU.

        Args:
            tokens, labels: int64 [B, T].
            starts: int64 [B, T], where each token's document begins, for a model that attends inside documents.
        """
        logits = self._logits(tokens, starts).flatten(0, 1)  # [B * T, V]
        expected = labels.to(self.device).flatten()
        blocks = zip(logits.split(_BLOCK), expected.split(_BLOCK), strict=True)
        losses = [F.cross_entropy(x.float(), y, reduction="none") for x, y in blocks]
        return torch.cat(losses).view(labels.shape).cpu()

    @torch.no_grad()
    def forward(self, tokens: Tensor, starts: Tensor | None = None) -> None:
        """For what the layers record on the way."""
        self._logits(tokens, starts)

    def _logits(self, tokens: Tensor, starts: Tensor | None) -> Tensor:
        documents = None if starts is None else Documents.from_starts(starts, self.device)
        tokens = tokens.to(self.device)
        return self.module(tokens, torch.arange(tokens.shape[1], device=self.device).expand_as(tokens), documents)


@contextmanager
def evaluated(model: Opened, device: torch.device, dtype: torch.dtype, selection: str) -> Iterator[Evaluated]:
    """The model with its weights, on a device.

    Args:
        model: an opened checkpoint.
        device, dtype: where and in what type it computes.
        selection: ``mosa.selection`` of its MoSA heads; "threshold" where the checkpoint has no thresholds: those are
            to be calibrated.
    """
    config = model.config if selection == model.config.mosa.selection else calibrating(model.config)
    config = replace(config, mosa=replace(config.mosa, backend="auto"))
    with one_process(config):
        module = build_empty_model(config, model.vocab_rows).eval()
        fill_model(module, model.read, {weight.name for weight in model.weights})
        yield Evaluated(module.to(device=device, dtype=dtype), device)
