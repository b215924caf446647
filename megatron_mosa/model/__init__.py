"""The language model: construction, initial weights, FLOPs and parameter counts."""

from megatron_mosa.model.costs import model_flops, paper_flops, parameter_count, usual_flops
from megatron_mosa.model.gpt import build_empty_model, build_model, language_model_loss, transformer_config
from megatron_mosa.model.initialization import initial_weights

__all__ = [
    "build_empty_model",
    "build_model",
    "initial_weights",
    "language_model_loss",
    "model_flops",
    "paper_flops",
    "parameter_count",
    "transformer_config",
    "usual_flops",
]
