"""FLOPs, parameters and memory of a model.

``paper_flops`` follows the paper (section 2): dense attention is counted in full, the vocabulary and document
boundaries are not. It defines equal budgets. ``model_flops`` counts what must be executed: causal attention counts each
pair once, and the vocabulary counts. It defines MFU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megatron_mosa.attention import KINDS, causal_pairs
from megatron_mosa.config import Config, padded_vocab_size


def mlp_flops(hidden_size: int, ffn_hidden_size: int, sequence_length: int, matrices: int = 2) -> int:
    """Return the forward FLOPs of an MLP's matrices on one sequence: 16 h^2 T for two matrices at d_ff = 4h."""
    return 2 * matrices * hidden_size * ffn_hidden_size * sequence_length


def paper_flops(config: Config) -> int:
    """Return the forward FLOPs of one sequence by the paper's formulas, less the k and v that grouped queries share."""
    model, length = config.model, config.data.sequence_length
    mlp = mlp_flops(model.hidden_size, model.mlp_width, length, _mlp_matrices(config))
    return model.num_layers * (sum(kind.paper_flops(config) for kind in KINDS) + mlp)


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
    """FLOPs of one sequence; ``pairs`` counts queries and keys of all but local heads, by default causal ones."""
    model, length = config.model, config.data.sequence_length
    heads = sum(kind.step_flops(config, lengths, pairs or causal_pairs) for kind in KINDS)
    mlp = 3 * mlp_flops(model.hidden_size, model.mlp_width, length, _mlp_matrices(config))
    return model.num_layers * (heads + mlp) + 3 * 2 * model.hidden_size * vocab_size * length


def parameter_count(config: Config, vocab_size: int) -> int:
    """Return the number of parameters of the whole model, including norms and the padding of the vocabulary."""
    model = config.model
    hidden = model.hidden_size
    attention = sum(math.prod(shape) for kind in KINDS for shape in kind.weights(config).values())
    norm = hidden * (2 if model.normalization == "LayerNorm" else 1)
    layer = attention + _mlp_matrices(config) * hidden * config.model.mlp_width + 2 * norm
    embeddings = (1 if model.tie_embeddings else 2) * hidden * padded_vocab_size(vocab_size, model.vocab_size_multiple)
    return model.num_layers * layer + embeddings + norm


def state_bytes(config: Config, vocab_size: int, world_size: int) -> dict[str, int]:
    """Return the bytes of model and optimizer state on each rank's device, by part.

    Parameters are counted as if all were divided by the tensor-parallel size; the norms, which are not, are small. bf16
    keeps an fp32 master of each weight beside Adam's two moments, and accumulates gradients in fp32. ZeRO divides
    optimizer state (1), gradients (2) and weights (3) over the data-parallel ranks.
    """
    tensor_parallel, stage = config.parallel.tensor_model_parallel_size, config.parallel.zero_stage
    replicas = max(world_size // tensor_parallel, 1)
    parameters = -(-parameter_count(config, vocab_size) // tensor_parallel)
    is_bf16 = config.train.precision == "bf16"

    def share(size: int, least_stage: int) -> int:
        return -(-parameters * size // (replicas if stage >= least_stage else 1))

    state = share(12 if is_bf16 else 8, 1)
    return {
        "weights": share(2 if is_bf16 else 4, 3),
        "gradients": share(4, 2),
        "optimizer state": 0 if config.parallel.offload_optimizer else state,
    }


def _mlp_matrices(config: Config) -> int:
    return 3 if config.model.activation == "swiglu" else 2
