"""Megatron-core's GPTModel with a masked loss, which it can also compute with compiled layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_mosa.attention import DecoderLayer, mosa_layers
from megatron_mosa.kernels import Documents, KernelBackend, PackedDocuments
from megatron_mosa.parallel import TensorParallelRegion, tensor_parallel_group


class OutputLoss(torch.nn.Module):
    """The output layer and its loss in one function, which never has all logits in memory.

    Has no parameters. It is a module because ZeRO-3 gathers weights around the calls of modules.
    """

    function: Callable[..., Tensor]

    def forward(self, states: Tensor, *args: Any, layer: torch.nn.Module) -> Tensor:
        """Call ``function`` with the states, the weight of ``layer``, and ``args``."""
        return self.function(states, layer.weight, *args)


class MosaGPTModel(GPTModel):
    """A GPTModel that, given labels and a loss mask, returns the masked sum of the token losses.

    After ``compile_layers`` the loss is computed in chunks of the logits, and training uses compiled layers. Parameters
    and their names stay the same.
    """

    _compiled_layers: tuple[DecoderLayer, ...] = ()  # a tuple, because a list would register submodules
    _region: TensorParallelRegion
    _document_capacity = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.output_loss = OutputLoss()  # used after compile_layers

    @property
    def vocabulary_layer(self) -> torch.nn.Module:
        """The module whose weight makes logits of hidden states."""
        return self.embedding.word_embeddings if self.share_embeddings_and_output_weights else self.output_layer

    def compile_layers(
        self, kernels: KernelBackend, loss: Callable[..., Tensor] | None = None, backend: str | None = "inductor"
    ) -> None:
        """Compile the layers, for training; parameters must be on their final device and of their final type.

        Args:
            kernels: the backend of the heads.
            loss: a function like ``linear_cross_entropy``; default: that of ``kernels``.
            backend: the backend of torch.compile; None: layers run uncompiled.
        """
        torch.compiler.reset()  # variants compiled for an earlier model in this process count towards the same limit
        self.output_loss.function = loss or kernels.linear_cross_entropy
        group = tensor_parallel_group()
        self._region = TensorParallelRegion(group.group_name, group.size(), self.config.sequence_parallel)
        self._compiled_layers = tuple(
            DecoderLayer(cast(Any, layer), kernels, self._region, backend) for layer in self.decoder.layers
        )

    def pack(self, documents: Documents) -> PackedDocuments:
        """Return documents in shapes that change only when a batch has more of them than any before."""
        number = len(documents.cu_seqlens) - 1
        if number > self._document_capacity:
            self._document_capacity = 1 << (2 * number).bit_length()  # with room, since each change compiles again
        return documents.packed(self._document_capacity)

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
        """Return GPTModel's result, or with ``labels`` and ``loss_mask``, [B, T], the masked sum of losses in fp32."""
        if labels is None or loss_mask is None:
            return super().forward(input_ids, position_ids, attention_mask, *args, labels=cast(Any, labels), **options)
        if not self._compiled_layers:
            losses = super().forward(input_ids, position_ids, attention_mask, *args, labels=labels, **options)
            return (losses.float() * loss_mask).sum()
        hidden_states = cast(Any, self.embedding)(input_ids=input_ids, position_ids=position_ids)
        # [T, B, h], or [T / tensor-parallel size, B, h] under sequence parallelism
        # Training and evaluation call the same modules in the same order, which ZeRO-3 fetches weights ahead by.
        if self.training and torch.is_grad_enabled():
            above = any(heads.selects_above(training=True) for heads in mosa_layers(self))
            documents = self.pack(attention_mask) if isinstance(attention_mask, Documents) else attention_mask
            for layer, compiled in zip(self.decoder.layers, self._compiled_layers, strict=True):
                hidden_states = layer(hidden_states, compiled=compiled, above=above, documents=documents)
        else:
            for layer in self.decoder.layers:
                hidden_states, _ = layer(hidden_states, attention_mask=attention_mask)
        hidden_states = cast(Any, self.decoder.final_layernorm)(hidden_states)
        states = self._region.enter(hidden_states).flatten(0, 1)
        targets, token_weights = labels.t().flatten(), loss_mask.t().flatten()
        return self.output_loss(states, targets, token_weights, tensor_parallel_group(), layer=self.vocabulary_layer)
