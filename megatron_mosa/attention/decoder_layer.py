"""A transformer layer in one plain function, which torch.compile makes one graph of, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention.recompute import MosaTransformerLayer
from megatron_mosa.kernels import KernelBackend


class DecoderLayer(torch.nn.Module):
    """What a ``MosaTransformerLayer`` computes in training, with its parameters: dense and MoSA heads, and the MLP.

    Megatron's own layer does not compile in one piece. This one is for one tensor-parallel rank, whole sequences
    without documents, no local heads and no recompute. A class, and not a function made for each layer, because all
    its instances share one compiled graph.

    Args:
        layer: provides the parameters. Do not register this module in the model: the parameters would appear twice.
        kernels: the backend of the heads.
    """

    def __init__(self, layer: MosaTransformerLayer, kernels: KernelBackend) -> None:
        super().__init__()
        self.layer = layer
        self.kernels = kernels

    def forward(self, hidden_states: Tensor, above: bool) -> Tensor:
        """[T, B, h] to [T, B, h]; ``above``: MoSA heads select by their thresholds, not by expert choice."""
        layer, config, attention = self.layer, self.layer.config, self.layer.self_attention
        states = _normalized(layer.input_layernorm, hidden_states)
        if attention.dense_heads is not None:
            hidden_states = hidden_states + attention.dense_heads(states, None, self.kernels)
        if attention.mosa_heads is not None:
            hidden_states = hidden_states + attention.mosa_heads.attend(states, None, self.kernels, True, above)[0]
        states = F.linear(_normalized(layer.pre_mlp_layernorm, hidden_states), layer.mlp.linear_fc1.weight)
        if config.gated_linear_unit:
            gate, states = states.chunk(2, dim=-1)
            states = config.activation_func(gate) * states
        else:
            states = config.activation_func(states)
        return hidden_states + F.linear(states, layer.mlp.linear_fc2.weight)


def _normalized(norm: object, states: Tensor) -> Tensor:
    if isinstance(norm, torch.nn.LayerNorm):
        return F.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    assert isinstance(norm, torch.nn.RMSNorm)
    return F.rms_norm(states, norm.normalized_shape, norm.weight, norm.eps)
