"""Norms for sequence parallelism: their replicated parameters get the gradient of the whole sequence.

Under sequence parallelism every rank of the tensor-parallel group sees a slice of the sequence, so the gradients of
weight and bias are partial sums. The autograd graph sums them (identity forward, all-reduce backward) before any
optimizer hook sees them. The parameters therefore carry no ``sequence_parallel`` tag, or Megatron's own
``finalize_model_grads`` would sum them a second time. NVIDIA apex's fused norms are used where apex is installed.

The signatures are those of Megatron-core's layer-norm builders.
"""

from __future__ import annotations

from types import ModuleType

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.parallel.apex import apex_norms
from megatron_mosa.parallel.groups import tensor_parallel_group
from megatron_mosa.parallel.regions import sum_gradients


class _SequenceParallelNorm(torch.nn.Module):
    """Mixin for one of torch's norms: construction by Megatron's signature, and parameters with whole gradients."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.sums_gradients = config.sequence_parallel and config.tensor_model_parallel_size > 1
        self.uses_apex = getattr(config, "mosa_apex_norms", True)

    def _summed(self, parameter: Tensor) -> Tensor:
        return sum_gradients(parameter, tensor_parallel_group()) if self.sums_gradients else parameter

    def _apex(self, states: Tensor) -> ModuleType | None:
        return apex_norms() if self.uses_apex and states.is_cuda else None


class SequenceParallelLayerNorm(_SequenceParallelNorm, torch.nn.LayerNorm):
    """LayerNorm of [..., hidden_size], correct on full sequences and on a rank's slice of them."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._summed(self.weight), self._summed(self.bias)
        if apex := self._apex(input):
            return apex.fused_layer_norm_affine(input, weight, bias, self.normalized_shape, self.eps)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class SequenceParallelRMSNorm(_SequenceParallelNorm, torch.nn.RMSNorm):
    """RMSNorm of [..., hidden_size], correct on full sequences and on a rank's slice of them."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self._summed(self.weight)
        if apex := self._apex(x):
            return apex.fused_rms_norm_affine(x, weight, self.normalized_shape, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def norm_class(normalization: str) -> type[torch.nn.Module]:
    """Return the norm class with a name.

    Raises:
        ValueError: a name other than "LayerNorm" and "RMSNorm".
    """
    kinds = {"LayerNorm": SequenceParallelLayerNorm, "RMSNorm": SequenceParallelRMSNorm}
    if normalization not in kinds:
        raise ValueError(f"normalization must be one of {', '.join(map(repr, kinds))}, got {normalization!r}")
    return kinds[normalization]
