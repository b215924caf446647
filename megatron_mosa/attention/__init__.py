"""The MoSA layer, as a function of tensors and as a Megatron-core layer spec."""

from typing import TYPE_CHECKING

from megatron_mosa.utils import lazy_face

if TYPE_CHECKING:
    from megatron_mosa.attention.config import MosaTransformerConfig
    from megatron_mosa.attention.decoder_layer import DecoderLayer
    from megatron_mosa.attention.functional import mosa_attention, num_selected_tokens
    from megatron_mosa.attention.heads import MosaHeads, PartitionedHeads
    from megatron_mosa.attention.kind import HeadKind
    from megatron_mosa.attention.kinds import (
        KINDS,
        causal_pairs,
        dense_head_flops,
        local_head_flops,
        local_window,
        looks_ahead,
        mosa_head_flops,
    )
    from megatron_mosa.attention.layer import MosaSelfAttention
    from megatron_mosa.attention.overlap import run_overlapped
    from megatron_mosa.attention.recompute import MosaTransformerLayer
    from megatron_mosa.attention.spec import MosaSpecProvider, get_mosa_block_spec, get_mosa_layer_spec
    from megatron_mosa.attention.thresholds import (
        DEAD,
        OVERLOADED,
        forget_scores,
        is_causal,
        mosa_layers,
        selection_buffers,
        update_thresholds,
    )

__all__ = [
    "DEAD",
    "KINDS",
    "OVERLOADED",
    "DecoderLayer",
    "HeadKind",
    "MosaHeads",
    "MosaSelfAttention",
    "MosaSpecProvider",
    "MosaTransformerConfig",
    "MosaTransformerLayer",
    "PartitionedHeads",
    "causal_pairs",
    "dense_head_flops",
    "forget_scores",
    "get_mosa_block_spec",
    "get_mosa_layer_spec",
    "is_causal",
    "local_head_flops",
    "local_window",
    "looks_ahead",
    "mosa_attention",
    "mosa_head_flops",
    "mosa_layers",
    "num_selected_tokens",
    "run_overlapped",
    "selection_buffers",
    "update_thresholds",
]

__getattr__, __dir__ = lazy_face(__name__, __file__)
