"""Layer norm for sequence parallelism: its replicated parameters get the gradient of the whole sequence."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.parallel.groups import tensor_parallel_group
from megatron_mosa.parallel.regions import sum_gradients


class SequenceParallelLayerNorm(torch.nn.LayerNorm):
    """LayerNorm over the last dimension, right on full sequences and on a rank's slice of them.

    Under sequence parallelism every rank of the tensor-parallel group sees a slice of the sequence, so the gradients
    of weight and bias are partial sums. They are added up in the autograd graph (identity forward, all-reduce
    backward), before any hook of an optimizer sees them. The parameters therefore carry no ``sequence_parallel`` tag:
    Megatron's own ``finalize_model_grads`` would add them up a second time.

    Signature as Megatron-core's layer-norm builders.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        if config.normalization != "LayerNorm":
            raise ValueError(f"normalization={config.normalization!r} is not supported; legal: 'LayerNorm'")
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.sums_gradients = config.sequence_parallel and config.tensor_model_parallel_size > 1

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [..., hidden_size]."""
        weight, bias = self.weight, self.bias
        if self.sums_gradients:
            group = tensor_parallel_group()
            weight = sum_gradients(weight, group)
            bias = sum_gradients(bias, group)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
