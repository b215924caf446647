"""Fixed heads: attention among every ``stride``-th token, the paper's static baseline (arXiv 2505.00315, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention.causal_heads import CausalHeads
from megatron_mosa.attention.config import MosaTransformerConfig
from megatron_mosa.kernels import AnyDocuments, KernelBackend, naive


class FixedHeads(CausalHeads):
    """Heads that attend among tokens 0, s, 2s, ... of the sequence, with s = ``mosa_fixed_stride``.

    Other tokens get no output. Causal, and without a gate, as in the paper. All heads see the same tokens, so they need
    only a slice of the sequence and dense attention. The stride is counted from the beginning of the packed sequence,
    whatever its documents; attention stays within these.
    """

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config, tp_group, config.num_fixed_heads, config.num_fixed_heads, is_gated=False)
        self.stride = config.mosa_fixed_stride

    def forward(
        self,
        hidden_states: Tensor,
        documents: AnyDocuments | None = None,
        kernels: KernelBackend = naive,
    ) -> Tensor:
        strided = None if documents is None else documents.strided(self.stride)
        output = super().forward(hidden_states[:: self.stride], strided, kernels)  # [k, B, h]
        padded = F.pad(output.unsqueeze(1), (0, 0, 0, 0, 0, self.stride - 1))  # [k, s, B, h]
        return padded.flatten(0, 1)[: hidden_states.shape[0]]
