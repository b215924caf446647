"""Convert models between formats, one tensor at a time, without a GPU."""

from typing import TYPE_CHECKING

from megatron_mosa.utils import lazy_face

if TYPE_CHECKING:
    from megatron_mosa.convert.dataset import open_dataset, open_given_dataset
    from megatron_mosa.convert.formats.hf import check_hugging_face
    from megatron_mosa.convert.formats.mosa import CheckpointReader
    from megatron_mosa.convert.formats.mosa_pytorch import import_layer
    from megatron_mosa.convert.formats.safetensors import read_json
    from megatron_mosa.convert.initial import find_initial_weights
    from megatron_mosa.convert.locate import Kind, find_model
    from megatron_mosa.convert.logits import load_weights, single_process_groups
    from megatron_mosa.convert.model_config import (
        changed_settings,
        check_vocabulary,
        from_transformers,
        stored_to_transformers,
    )
    from megatron_mosa.convert.model_reader import ModelReader, open_model
    from megatron_mosa.convert.weights import lacks_thresholds

__all__ = [
    "CheckpointReader",
    "Kind",
    "ModelReader",
    "changed_settings",
    "check_hugging_face",
    "check_vocabulary",
    "find_initial_weights",
    "find_model",
    "from_transformers",
    "import_layer",
    "lacks_thresholds",
    "load_weights",
    "open_dataset",
    "open_given_dataset",
    "open_model",
    "read_json",
    "single_process_groups",
    "stored_to_transformers",
]

__getattr__, __dir__ = lazy_face(__name__, __file__)
