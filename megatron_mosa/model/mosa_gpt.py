"""Megatron-core's GPTModel with a masked loss, which it can also compute with compiled layers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_mosa.attention import DecoderLayer, mosa_layers, run_overlapped
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
    _overlaps = False
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
        self,
        kernels: KernelBackend,
        loss: Callable[..., Tensor] | None = None,
        backend: str | None = "inductor",
        overlaps: bool = False,
    ) -> None:
        """Compile the layers, for training; parameters must be on their final device and of their final type.

        Args:
            kernels: the backend of the heads.
            loss: a function like ``linear_cross_entropy``; default: that of ``kernels``.
            backend: the backend of torch.compile; None: layers run uncompiled.
            overlaps: whether halves of a micro-batch take turns, so that tensor-parallel collectives run beside
                computation; without documents and recompute, and for an even number of sequences.
        """
        torch.compiler.reset()  # variants compiled for an earlier model in this process count towards the same limit
        self.output_loss.function = loss or kernels.linear_cross_entropy
        group = tensor_parallel_group()
        copies = os.environ.get("MOSA_COPIES") == "1"
        self._region = TensorParallelRegion(
            group.group_name, group.size(), self.config.sequence_parallel, group.rank(), copies
        )
        self._overlaps = overlaps
        layers = cast(Any, self.decoder.layers)
        following = [*(layer.input_layernorm for layer in layers[1:]), cast(Any, self.decoder.final_layernorm)]
        self._compiled_layers = tuple(
            DecoderLayer(layer, norm, kernels, self._region, backend)
            for layer, norm in zip(layers, following, strict=True)
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
            states = self._run_compiled_layers(hidden_states, attention_mask)
        else:
            for layer in self.decoder.layers:
                hidden_states, _ = layer(hidden_states, attention_mask=attention_mask)
            states = self._leave_layers(hidden_states)
        targets, token_weights = labels.t().flatten(), loss_mask.t().flatten()
        group = tensor_parallel_group()
        return self.output_loss(states.flatten(0, 1), targets, token_weights, group, layer=self.vocabulary_layer)

    def _run_compiled_layers(self, hidden_states: Tensor, attention_mask: Any) -> Tensor:
        """Return the states that the output layer multiplies, [T, B, h]."""
        above = any(heads.selects_above(training=True) for heads in mosa_layers(self))
        if self._overlaps:
            return run_overlapped(self._compiled_layers, hidden_states, above)
        documents = self.pack(attention_mask) if isinstance(attention_mask, Documents) else attention_mask
        for layer, compiled in zip(self.decoder.layers, self._compiled_layers, strict=True):
            hidden_states = layer(hidden_states, compiled=compiled, above=above, documents=documents)
        return self._leave_layers(hidden_states)

    def _leave_layers(self, hidden_states: Tensor) -> Tensor:
        return self._region.enter(cast(Any, self.decoder.final_layernorm)(hidden_states))
