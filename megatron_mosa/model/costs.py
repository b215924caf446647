"""FLOPs and parameters of a model.

``paper_flops`` follows the paper (section 2): dense attention is counted in full, the vocabulary and document
boundaries are not. It defines equal budgets. ``model_flops`` counts what must be executed: causal attention counts each
pair once, and the vocabulary counts. It defines MFU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_mosa.attention import num_selected_tokens
from megatron_mosa.config import Config, padded_vocab_size


def dense_head_flops(hidden_size: int, head_dim: int, sequence_length: int) -> int:
    """Return the forward FLOPs of one dense head on one sequence: 8 h h' T + 4 h' T^2."""
    return 8 * hidden_size * head_dim * sequence_length + 4 * head_dim * sequence_length**2


def mosa_head_flops(hidden_size: int, head_dim: int, sequence_length: int, num_selected: int) -> int:
    """Return the forward FLOPs of one MoSA head on one sequence: 8 h h' k + 4 h' k^2 + 2 h T + h' k."""
    return (
        8 * hidden_size * head_dim * num_selected
        + 4 * head_dim * num_selected**2
        + 2 * hidden_size * sequence_length
        + head_dim * num_selected
    )


def local_head_flops(hidden_size: int, head_dim: int, sequence_length: int, window: int) -> int:
    """Return the forward FLOPs of one sliding-window head on one sequence: 8 h h' T + 4 h' T w (not in the paper)."""
    return 8 * hidden_size * head_dim * sequence_length + 4 * head_dim * sequence_length * window


def mlp_flops(hidden_size: int, ffn_hidden_size: int, sequence_length: int, matrices: int = 2) -> int:
    """Return the forward FLOPs of an MLP's matrices on one sequence: 16 h^2 T for two matrices at d_ff = 4h."""
    return 2 * matrices * hidden_size * ffn_hidden_size * sequence_length


def local_window(config: Config) -> int:
    """Return the window of a local head in tokens: ``model.local_window``, or T / rho as in the paper's long runs."""
    selected = num_selected_tokens(config.data.sequence_length, config.mosa.sparsity)
    return min(config.model.local_window or selected, config.data.sequence_length)


def paper_flops(config: Config) -> int:
    """Return the forward FLOPs of one sequence by the paper's formulas, less the k and v that grouped queries share."""
    model, length = config.model, config.data.sequence_length
    hidden, head_dim = model.hidden_size, model.head_dim
    selected = num_selected_tokens(length, config.mosa.sparsity)
    layer = (
        model.num_dense_heads * dense_head_flops(hidden, head_dim, length)
        - 2 * hidden * head_dim * length * _shared_key_value_heads(config)
        + model.num_local_heads * local_head_flops(hidden, head_dim, length, local_window(config))
        + config.mosa.num_heads * mosa_head_flops(hidden, head_dim, length, selected)
        + mlp_flops(hidden, config.model.mlp_width, length, _mlp_matrices(config))
    )
    return model.num_layers * layer


def model_flops(config: Config, vocab_size: int, documents: Sequence[Sequence[int]] = ()) -> int:
    """Return the FLOPs that a training step must execute for one sequence, forward and backward.

    A query attends only to keys at or before it, and the vocabulary counts without its padding. Backward costs twice
    the forward, except for the router, whose gradient is nonzero only at the selected tokens. Recomputation,
    elementwise operations and the optimizer do not count.

    Args:
        documents: the lengths of the documents in each of some typical sequences, to average over if attention stays
            within documents. If empty, every sequence is one document.
    """
    if not documents or not config.model.attend_within_documents:
        documents = [[config.data.sequence_length]]
    return round(sum(_sequence_flops(config, vocab_size, lengths) for lengths in documents) / len(documents))


def usual_flops(config: Config, vocab_size: int) -> int:
    """Return what others count for a step: ``model_flops`` with full attention and the embedding as a matrix product.

    Keys after a query count too, and reading a row of the embedding counts as multiplying by all of it.
    """
    embedding = 3 * 2 * config.model.hidden_size * vocab_size * config.data.sequence_length
    return round(
        _sequence_flops(config, vocab_size, [config.data.sequence_length], lambda tokens: tokens**2) + embedding
    )


def _sequence_flops(
    config: Config, vocab_size: int, lengths: Sequence[int], pairs: Callable[[float], float] | None = None
) -> float:
    """FLOPs of one sequence; ``pairs`` counts queries and keys of dense and MoSA heads, by default causal ones."""
    pairs = pairs or _causal_pairs
    model, length = config.model, config.data.sequence_length
    hidden, head_dim = model.hidden_size, model.head_dim
    selected = _selected_of_documents(config, lengths)
    window = local_window(config)
    weights = 2 * hidden * head_dim  # FLOPs of one of a head's four matrices on one token
    pair = 4 * head_dim  # FLOPs of one query and key: their dot product, and the weighted value
    dense = 4 * weights * length + pair * sum(map(pairs, lengths))
    local = 4 * weights * length + pair * sum(
        _causal_pairs(length) - _causal_pairs(max(length - window, 0)) for length in lengths
    )
    mosa = 4 * weights * sum(selected) + pair * sum(map(pairs, selected))
    router = 2 * hidden * length + 4 * hidden * sum(selected)
    matrices = (
        model.num_dense_heads * dense
        - weights * length * _shared_key_value_heads(config)
        + model.num_local_heads * local
        + config.mosa.num_heads * mosa
        + mlp_flops(hidden, config.model.mlp_width, length, _mlp_matrices(config))
    )
    layer = 3 * matrices + config.mosa.num_heads * router
    return model.num_layers * layer + 3 * 2 * hidden * vocab_size * length


def _selected_of_documents(config: Config, lengths: Sequence[int]) -> list[float]:
    """Return how many tokens of each document a MoSA head selects, in proportion to its length if per sequence."""
    length, sparsity = config.data.sequence_length, config.mosa.sparsity
    if config.mosa.selection_scope == "document":
        return [num_selected_tokens(document, sparsity) for document in lengths]
    return [num_selected_tokens(length, sparsity) * document / length for document in lengths]


def _causal_pairs(tokens: float) -> float:
    """Return the number of pairs of a query and a key at or before it."""
    return tokens * (tokens + 1) / 2


def parameter_count(config: Config, vocab_size: int) -> int:
    """Return the number of parameters of the whole model, including norms and the padding of the vocabulary."""
    model = config.model
    hidden = model.hidden_size
    matrix = hidden * model.head_dim
    heads = model.num_dense_heads + model.num_local_heads + config.mosa.num_heads
    attention = (4 * heads - _shared_key_value_heads(config)) * matrix + config.mosa.num_heads * hidden
    norm = hidden * (2 if model.normalization == "LayerNorm" else 1)
    layer = attention + _mlp_matrices(config) * hidden * config.model.mlp_width + 2 * norm
    embeddings = (1 if model.tie_embeddings else 2) * hidden * padded_vocab_size(vocab_size, model.vocab_size_multiple)
    return model.num_layers * layer + embeddings + norm


def _shared_key_value_heads(config: Config) -> int:
    """Return how many key and value matrices grouped queries save."""
    groups = config.model.num_query_groups or config.model.num_dense_heads
    return 2 * (config.model.num_dense_heads - groups)


def _mlp_matrices(config: Config) -> int:
    return 3 if config.model.activation == "swiglu" else 2
