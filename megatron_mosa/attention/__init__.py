"""The MoSA layer, as a function of tensors and as a Megatron-core layer spec."""

from megatron_mosa.attention.config import MosaTransformerConfig
from megatron_mosa.attention.functional import mosa_attention, num_selected_tokens
from megatron_mosa.attention.layer import MosaSelfAttention
from megatron_mosa.attention.spec import MosaSpecProvider, get_mosa_block_spec, get_mosa_layer_spec

__all__ = [
    "MosaSelfAttention",
    "MosaSpecProvider",
    "MosaTransformerConfig",
    "get_mosa_block_spec",
    "get_mosa_layer_spec",
    "mosa_attention",
    "num_selected_tokens",
]
