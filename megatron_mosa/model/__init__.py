"""The language model: construction, initial weights, FLOPs and parameter counts."""

from typing import TYPE_CHECKING

from megatron_mosa.utils import lazy_face

if TYPE_CHECKING:
    from megatron_mosa.attention import dense_head_flops, local_head_flops, local_window, mosa_head_flops
    from megatron_mosa.model.calibration import CALIBRATION_PASSES, calibrate, calibration_config
    from megatron_mosa.model.costs import model_flops, paper_flops, parameter_count, state_bytes, usual_flops
    from megatron_mosa.model.gpt import build_empty_model, build_model, language_model_loss, transformer_config
    from megatron_mosa.model.initialization import draw, draw_state, initial_weights
    from megatron_mosa.model.mosa_gpt import MosaGPTModel
    from megatron_mosa.model.state import StoredTensor, stored_tensors

__all__ = [
    "CALIBRATION_PASSES",
    "MosaGPTModel",
    "StoredTensor",
    "build_empty_model",
    "build_model",
    "calibrate",
    "calibration_config",
    "dense_head_flops",
    "draw",
    "draw_state",
    "initial_weights",
    "language_model_loss",
    "local_head_flops",
    "local_window",
    "model_flops",
    "mosa_head_flops",
    "paper_flops",
    "parameter_count",
    "state_bytes",
    "stored_tensors",
    "transformer_config",
    "usual_flops",
]

__getattr__, __dir__ = lazy_face(__name__, __file__)
