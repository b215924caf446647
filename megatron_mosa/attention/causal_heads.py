"""Dense and local heads, and what they share with other causal heads."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention.config import MosaTransformerConfig
from megatron_mosa.attention.heads import Contribution, PartitionedHeads
from megatron_mosa.attention.shared_linear import shared_linear
from megatron_mosa.kernels import AnyDocuments, KernelBackend, document_attention, naive, sliding_window_attention


class CausalHeads(PartitionedHeads):
    """Base class of causal heads, with weights in the layout of Megatron's linear_qkv and linear_proj.

    Args:
        heads: number of query heads, over all tensor-parallel ranks.
        groups: number of groups that share one key and one value head, over all tensor-parallel ranks.
        is_gated: whether each head's output is multiplied by a sigmoid of a linear function of the token's state.
    """

    stride = 1  # distance of the tokens that ``attend`` is called with, for their rotary positions
    qkv_weight: torch.nn.Parameter  # [G / tp * (H / G + 2) h', h]
    proj_weight: torch.nn.Parameter  # [h, H / tp * h']
    gate_weight: torch.nn.Parameter  # [H / tp, h], if the heads are gated

    def __init__(
        self,
        config: MosaTransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        heads: int,
        groups: int,
        is_gated: bool,
    ) -> None:
        super().__init__(config, tp_group)
        head_dim, width = config.head_dim, config.hidden_size
        init, output_init = cast(Any, config.init_method), cast(Any, config.output_layer_init_method)  # never None
        self.queries_per_group = heads // groups
        # rows: the queries, the key and the value of group 0, then of group 1, ...
        self.add_weight("qkv_weight", (groups * (self.queries_per_group + 2) * head_dim, width), 0, init)
        self.add_weight("proj_weight", (width, heads * head_dim), 1, output_init)
        self.is_gated = is_gated
        if is_gated:
            self.add_weight("gate_weight", (heads, width), 0, init)

    def forward(
        self,
        hidden_states: Tensor,
        documents: AnyDocuments | None = None,
        kernels: KernelBackend = naive,
    ) -> Tensor:
        """Compute this rank's part of the sum over heads: [T, B, h] from [T, B, h].

        Args:
            documents: the documents of the batch; None: each sequence is one document.
            kernels: the backend whose ``split_heads`` is used.
        """
        qkv = F.linear(hidden_states, self.qkv_weight)
        return self._output(hidden_states, qkv, documents, kernels)

    def _output(
        self, hidden_states: Tensor, qkv: Tensor, documents: AnyDocuments | None, kernels: KernelBackend
    ) -> Tensor:
        """Compute what follows the product of the states and ``qkv_weight``."""
        length, batch, _ = hidden_states.shape
        config, queries = self.config, self.queries_per_group
        qkv = qkv.view(length, batch, -1, queries + 2, config.head_dim)
        starts = None
        if documents is not None and config.mosa_restart_rotary:
            starts = documents.starts if self.stride == 1 else documents.starts * self.stride
        rotation = config.mosa_rotary_percent, config.mosa_rotary_base
        query, key, value = kernels.split_heads(qkv, *rotation, starts, self.stride)
        attended = self.attend(query, key, value, documents).permute(2, 0, 1, 3)  # [T, B, H, h']
        if self.is_gated:
            logits = F.linear(hidden_states, self.gate_weight)  # [T, B, H]
            gate = torch.sigmoid(logits.to(naive.accumulation_dtype(logits.dtype))).unsqueeze(-1)
            attended = (attended.to(gate.dtype) * gate).to(attended.dtype)
        return F.linear(attended.flatten(2), self.proj_weight)

    def contribute(
        self,
        hidden_states: Tensor,
        documents: AnyDocuments | None,
        kernels: KernelBackend,
        above: bool,
        selected: Tensor | None,
        addend: Tensor | None,
        is_last: bool,
    ) -> Contribution:
        if is_last or self.stride > 1:  # other heads do not use the same slice of the states
            output = self(hidden_states, documents, kernels)
        else:
            qkv, hidden_states = shared_linear(hidden_states, self.qkv_weight)
            output = self._output(hidden_states, qkv, documents, kernels)
        return Contribution(output if addend is None else addend + output, hidden_states)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: AnyDocuments | None) -> Tensor:
        """Compute causal attention to all earlier tokens of the document, without a T x T matrix in memory.

        Args:
            query: [B, H, T, h'].
            key, value: [B, G, T, h'].

        Returns:
            [B, H, T, h'].
        """
        if documents is not None:
            return document_attention(query, key, value, documents)
        grouped = self.queries_per_group > 1
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


class DenseHeads(CausalHeads):
    """Heads that attend to all earlier tokens of the document."""

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        heads, groups = config.num_attention_heads, cast(int, config.num_query_groups)
        super().__init__(config, tp_group, heads, groups, config.mosa_attention_gate)


class LocalHeads(CausalHeads):
    """Heads that attend to the last ``mosa_local_window`` tokens of the document, including the token itself."""

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        heads = config.num_local_heads
        super().__init__(config, tp_group, heads, heads, config.mosa_attention_gate)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: AnyDocuments | None) -> Tensor:
        return sliding_window_attention(query, key, value, self.config.mosa_local_window, documents)
