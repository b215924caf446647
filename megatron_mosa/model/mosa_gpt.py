"""Megatron-core's GPTModel with a loss that counts some tokens, and a fast way to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_mosa.attention import DecoderLayer, mosa_layers
from megatron_mosa.kernels import KernelBackend
from megatron_mosa.parallel import TensorParallelRegion, tensor_parallel_group


class MosaGPTModel(GPTModel):
    """A GPTModel that, given labels and a loss mask, returns the sum of the token losses that count.

    After ``compile_layers`` this loss is computed without whole logits, and in training by compiled layers. Parameters,
    their names, and everything else stay as they are.
    """

    _compiled_layers: tuple[DecoderLayer, ...] = ()  # a tuple, so that they are no submodules
    _linear_cross_entropy: Callable[..., Tensor]
    _region: TensorParallelRegion

    def compile_layers(
        self, kernels: KernelBackend, loss: Callable[..., Tensor] | None = None, backend: str | None = "inductor"
    ) -> None:
        """Take the fast way from now on; parameters must be where and of which type they will stay.

        Args:
            kernels: the backend of the heads, Triton's.
            loss: ``linear_cross_entropy``; that of ``kernels`` by default.
            backend: of torch.compile; None: layers run as they are written.
        """
        torch.compiler.reset()  # what an earlier model in this process has compiled counts towards the same limit
        self._linear_cross_entropy = loss or kernels.linear_cross_entropy
        group = tensor_parallel_group()
        self._region = TensorParallelRegion(group.group_name, group.size(), self.config.sequence_parallel)
        self._compiled_layers = tuple(
            DecoderLayer(cast(Any, layer), kernels, self._region, backend) for layer in self.decoder.layers
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Any,
        *args: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """As GPTModel; with ``labels`` and ``loss_mask``, [B, T] both, the masked sum of losses, an fp32 scalar."""
        if labels is None or loss_mask is None:
            return super().forward(input_ids, position_ids, attention_mask, *args, labels=cast(Any, labels), **options)
        if not self._compiled_layers:
            losses = super().forward(input_ids, position_ids, attention_mask, *args, labels=labels, **options)
            return (losses.float() * loss_mask).sum()
        hidden_states = cast(Any, self.embedding)(input_ids=input_ids, position_ids=position_ids)
        # [T, B, h], under sequence parallelism [T / tensor-parallel size, B, h]
        if self.training and torch.is_grad_enabled():
            above = any(heads.selects_above(training=True) for heads in mosa_layers(self))
            for layer in self._compiled_layers:
                hidden_states = layer(hidden_states, above)
            hidden_states = cast(Any, self.decoder.final_layernorm)(hidden_states)
        else:
            hidden_states = self.decoder(hidden_states=hidden_states, attention_mask=attention_mask)
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        states = self._region.enter(hidden_states).flatten(0, 1)
        targets, token_weights = labels.t().flatten(), loss_mask.t().flatten()
        return self._linear_cross_entropy(states, weight, targets, token_weights, tensor_parallel_group())
