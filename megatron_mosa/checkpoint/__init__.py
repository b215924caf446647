"""The format of checkpoints, independent of the parallel layout, and what a run needs to save and load them."""

from typing import TYPE_CHECKING

from megatron_mosa.utils import lazy_face

if TYPE_CHECKING:
    from megatron_mosa.checkpoint.file_slice import find_corrupt_file, find_corruption
    from megatron_mosa.checkpoint.format import load_initial_weights
    from megatron_mosa.checkpoint.index import StateIndex
    from megatron_mosa.checkpoint.manifest import (
        MANIFEST,
        DamagedError,
        FileRecord,
        damage_as_run_error,
        find_damage,
        hash_files,
        is_recorded,
        sync_and_evict,
        write_manifest,
    )
    from megatron_mosa.checkpoint.metadata import (
        FORMAT_VERSION,
        METADATA,
        Metadata,
        published_checkpoints,
        read_metadata,
        write_metadata,
    )
    from megatron_mosa.checkpoint.reader import StateReader, TensorInfo
    from megatron_mosa.checkpoint.store import CheckpointStore, NewestCheckpoint, check_resumable, check_same_model
    from megatron_mosa.checkpoint.writer import write_state_offline

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "METADATA",
    "CheckpointStore",
    "DamagedError",
    "FileRecord",
    "Metadata",
    "NewestCheckpoint",
    "StateIndex",
    "StateReader",
    "TensorInfo",
    "check_resumable",
    "check_same_model",
    "damage_as_run_error",
    "find_corrupt_file",
    "find_corruption",
    "find_damage",
    "hash_files",
    "is_recorded",
    "load_initial_weights",
    "published_checkpoints",
    "read_metadata",
    "sync_and_evict",
    "write_manifest",
    "write_metadata",
    "write_state_offline",
]

__getattr__, __dir__ = lazy_face(__name__, __file__)
