"""What a model costs: FLOPs of two kinds, and parameters.

``paper_flops`` is the rule of the paper (section 2): dense attention counted in full, no vocabulary; it defines equal
budgets. ``model_flops`` is what must be executed, causal attention counted once, vocabulary included; it defines MFU.
"""

from __future__ import annotations

from megatron_mosa.attention import num_selected_tokens
from megatron_mosa.config import Config, padded_vocab_size


def dense_head_flops(hidden_size: int, head_dim: int, sequence_length: int) -> int:
    """Forward FLOPs of one dense head on one sequence: 8 h h' T + 4 h' T^2."""
    return 8 * hidden_size * head_dim * sequence_length + 4 * head_dim * sequence_length**2


def mosa_head_flops(hidden_size: int, head_dim: int, sequence_length: int, num_selected: int) -> int:
    """Forward FLOPs of one MoSA head on one sequence: 8 h h' k + 4 h' k^2 + 2 h T + h' k."""
    return (
        8 * hidden_size * head_dim * num_selected
        + 4 * head_dim * num_selected**2
        + 2 * hidden_size * sequence_length
        + head_dim * num_selected
    )


def mlp_flops(hidden_size: int, ffn_hidden_size: int, sequence_length: int) -> int:
    """Forward FLOPs of the two matrices of an MLP on one sequence: 16 h^2 T at d_ff = 4h."""
    return 4 * hidden_size * ffn_hidden_size * sequence_length


def paper_flops(config: Config) -> int:
    """Forward FLOPs of one sequence by the paper's formulas."""
    model, length = config.model, config.data.sequence_length
    selected = num_selected_tokens(length, config.mosa.sparsity)
    layer = (
        model.num_dense_heads * dense_head_flops(model.hidden_size, model.head_dim, length)
        + config.mosa.num_heads * mosa_head_flops(model.hidden_size, model.head_dim, length, selected)
        + mlp_flops(model.hidden_size, _ffn(config), length)
    )
    return model.num_layers * layer


def model_flops(config: Config, vocab_size: int) -> int:
    """FLOPs that a training step must execute for one sequence, forward and backward.

    A query meets only the keys at or before it, and the vocabulary counts without its padding. Backward costs twice
    the forward, except for the router: its gradient is nonzero at the selected tokens alone. Recomputation, elementwise
    work and the optimizer do not count.
    """
    model, length = config.model, config.data.sequence_length
    hidden, head_dim = model.hidden_size, model.head_dim
    selected = num_selected_tokens(length, config.mosa.sparsity)
    dense = 8 * hidden * head_dim * length + 2 * head_dim * length * (length + 1)
    mosa = 8 * hidden * head_dim * selected + 2 * head_dim * selected * (selected + 1)
    router = 2 * hidden * length + 4 * hidden * selected
    matrices = model.num_dense_heads * dense + config.mosa.num_heads * mosa + mlp_flops(hidden, _ffn(config), length)
    layer = 3 * matrices + config.mosa.num_heads * router
    return model.num_layers * layer + 3 * 2 * hidden * vocab_size * length


def parameter_count(config: Config, vocab_size: int) -> int:
    """Parameters of the whole model, padded vocabulary and norms included."""
    model = config.model
    hidden, head_dim = model.hidden_size, model.head_dim
    attention = model.num_dense_heads * 4 * hidden * head_dim + config.mosa.num_heads * (4 * hidden * head_dim + hidden)
    norms = 2 * 2 * hidden
    layer = attention + 2 * hidden * _ffn(config) + norms
    embeddings = 2 * padded_vocab_size(vocab_size, model.vocab_size_multiple) * hidden
    return model.num_layers * layer + embeddings + 2 * hidden


def _ffn(config: Config) -> int:
    return config.model.ffn_hidden_size or 4 * config.model.hidden_size
