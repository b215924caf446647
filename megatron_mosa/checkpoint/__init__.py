"""Save, load and manage checkpoints in a format that is independent of the parallel layout."""

from megatron_mosa.checkpoint.format import FORMAT_VERSION, Metadata, read_metadata
from megatron_mosa.checkpoint.initial import find_initial_weights, load_initial_weights
from megatron_mosa.checkpoint.lifecycle import CheckpointStore, Newest, refuse_other_model

__all__ = [
    "FORMAT_VERSION",
    "CheckpointStore",
    "Metadata",
    "Newest",
    "find_initial_weights",
    "load_initial_weights",
    "read_metadata",
    "refuse_other_model",
]
