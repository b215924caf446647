"""Build tiny models of every kind with random weights, and thresholds near the middle of the scores."""

from __future__ import annotations

import torch

from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import MosaForCausalLM

VOCABULARY = 97
NO_HEADS = {"num_dense_heads": 0, "num_local_heads": 0, "num_mosa_heads": 0}
GATED = ("gated", "all")
KINDS = {
    "dense": {"num_dense_heads": 3},
    "grouped": {"num_dense_heads": 4, "num_key_value_heads": 2, "rotary_percent": 1.0},
    "local": {"num_local_heads": 3, "local_window": 5},
    "pure": {"num_mosa_heads": 6, "norm_type": "RMSNorm", "hidden_act": "silu"},
    "many": {"num_mosa_heads": 24, "num_local_heads": 1, "local_window": 3, "rotary_percent": 0.0},
    "hybrid": {
        "num_dense_heads": 4, "num_key_value_heads": 2, "num_local_heads": 2, "local_window": 6, "num_mosa_heads": 6,
        "tie_word_embeddings": True,
    },
    "fixed": {"num_fixed_heads": 3, "fixed_stride": 4},
    "gated": {"num_dense_heads": 4, "num_key_value_heads": 2, "num_local_heads": 2, "local_window": 5},
    "all": {
        "num_dense_heads": 2, "num_local_heads": 2, "local_window": 5, "num_fixed_heads": 2, "fixed_stride": 3,
        "num_mosa_heads": 6,
    },
    "chosen": {"num_dense_heads": 2, "num_mosa_heads": 8},
    "followed": {"num_dense_heads": 2, "num_mosa_heads": 6, "load_feedback": 0.5},
}  # fmt: skip

# Not causal, so nothing can be cached.
LOOKING_AHEAD = {
    "routing": {"num_dense_heads": 2, "num_routing_heads": 4, "routing_clusters": 3},
    "routing_hybrid": {"num_routing_heads": 2, "routing_clusters": 2, "num_mosa_heads": 6},
}


def build(kind: str, selection: str = "threshold", seed: int = 0, **changes: object) -> MosaForCausalLM:
    """Build a model whose attention matters: scores are spread out, and heads select about a quarter of the tokens."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 8,
        "sparsity": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    gate = {"attention_gate": kind in GATED}
    if kind == "chosen" and selection == "threshold":
        selection = "token_choice"
    config = MosaConfig(**(sizes | gate | NO_HEADS | (KINDS | LOOKING_AHEAD)[kind] | changes), selection=selection)
    model = MosaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = float("norm" in name and "weight" in name)
            parameter.copy_(center + 0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("head_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("centroids"):
                buffer.normal_(generator=generator).div_(buffer.norm(dim=-1, keepdim=True))
            if name.endswith("thresholds"):
                buffer.copy_(torch.empty_like(buffer).uniform_(0.5, 0.9, generator=generator))
    return model


def random_tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return random tokens [batch, length]."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
