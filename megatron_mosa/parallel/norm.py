"""Norms for sequence parallelism: their replicated parameters get the gradient of the whole sequence.

Under sequence parallelism every rank of the tensor-parallel group sees a slice of the sequence, so the gradients of
weight and bias are partial sums. The autograd graph sums them (identity forward, all-reduce backward) before any
optimizer hook sees them. The parameters therefore carry no ``sequence_parallel`` tag, or Megatron's own
``finalize_model_grads`` would sum them a second time. NVIDIA apex's fused norms are used where apex is installed.

The signatures are those of Megatron-core's layer-norm builders.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.parallel.apex import apex_norms
from megatron_mosa.parallel.groups import tensor_parallel_group
from megatron_mosa.parallel.regions import sum_gradients


class SequenceParallelLayerNorm(torch.nn.LayerNorm):
    """LayerNorm over the last dimension, correct on full sequences and on a rank's slice of them."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, device=_device(config), dtype=config.params_dtype)
        self.sums_gradients = _sums_gradients(config)
        self.uses_apex = _uses_apex(config)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [..., hidden_size]."""
        weight, bias = self.weight, self.bias
        if self.sums_gradients:
            group = tensor_parallel_group()
            weight, bias = sum_gradients(weight, group), sum_gradients(bias, group)
        apex = apex_norms() if self.uses_apex and input.is_cuda else None
        if apex is not None:
            return apex.fused_layer_norm_affine(input, weight, bias, self.normalized_shape, self.eps)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension, correct on full sequences and on a rank's slice of them."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, device=_device(config), dtype=config.params_dtype)
        self.sums_gradients = _sums_gradients(config)
        self.uses_apex = _uses_apex(config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size]."""
        weight = sum_gradients(self.weight, tensor_parallel_group()) if self.sums_gradients else self.weight
        apex = apex_norms() if self.uses_apex and x.is_cuda else None
        if apex is not None:
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


def _device(config: TransformerConfig) -> torch.device | int | None:
    return None if config.use_cpu_initialization else torch.cuda.current_device()


def _uses_apex(config: TransformerConfig) -> bool:
    return getattr(config, "mosa_apex_norms", True)


def _sums_gradients(config: TransformerConfig) -> bool:
    return config.sequence_parallel and config.tensor_model_parallel_size > 1
