"""Save, load and manage checkpoints in a format that is independent of the parallel layout."""

from megatron_mosa.checkpoint.format import FORMAT_VERSION, Metadata, load_initial_weights, read_metadata
from megatron_mosa.checkpoint.store import CheckpointStore, NewestCheckpoint, check_same_model

__all__ = [
    "FORMAT_VERSION",
    "CheckpointStore",
    "Metadata",
    "NewestCheckpoint",
    "check_same_model",
    "load_initial_weights",
    "read_metadata",
]
