"""Define checkpoint format 2, which is independent of the parallel layout.

A checkpoint is a folder ``step-00000100`` with ``metadata.json``, ``state/`` and ``manifest.json``. The state is
written by torch's distributed checkpoint (DCP): for each parameter the fp32 master weight and Adam's moments, under
Megatron's global names and global shapes, so that it can be read at any tensor- and data-parallel size. The manifest
(sizes and hashes of all files) is written last, and then the folder is renamed into place, so a folder under its final
name was complete when it was published. Format 1 had no manifest; it still loads.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mosa.checkpoint.host_memory import HostMemory
from megatron_mosa.checkpoint.manifest import DamagedError
from megatron_mosa.checkpoint.reader import MOMENTS, SafeReader, StateReader
from megatron_mosa.checkpoint.writer import is_storage_failure
from megatron_mosa.errors import StorageError, UserError
from megatron_mosa.parallel import data_parallel_group, tensor_parallel_group
from megatron_mosa.utils import first_line

if TYPE_CHECKING:
    from megatron_mosa.data import TokenizerIdentity
    from megatron_mosa.engine import TrainingEngine
    from megatron_mosa.model import StoredTensor

FORMAT_VERSION = 2
METADATA = "metadata.json"


@dataclass
class Metadata:
    """The content of ``metadata.json``; plain JSON."""

    step: int
    """Optimizer steps taken, skipped ones included."""

    consumed_samples: int
    """Samples consumed over all data-parallel ranks: the position in the data order."""

    optimizer_step: int
    """Adam's step count."""

    config: dict[str, Any]
    """The resolved configuration."""

    data: dict[str, Any]
    """index_samples, tokenizer_hash, encoding_hash, vocab_size and fingerprint of the dataset."""

    versions: dict[str, str]
    """Versions of the software that wrote the checkpoint."""

    layout: dict[str, int]
    """Tensor- and data-parallel size of the run that wrote the checkpoint; informational only."""

    format_version: int = FORMAT_VERSION

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """Identity of the dataset's tokenizer."""
        from megatron_mosa.data import TokenizerIdentity

        return TokenizerIdentity.recorded(self.data)

    @property
    def has_manifest(self) -> bool:
        """Whether checkpoints of this format version have a manifest."""
        return self.format_version >= 2


def snapshot(engine: TrainingEngine, memory: HostMemory) -> dict[str, Tensor]:
    """Copy this rank's share of the engine's state to host memory, so that it can be written later; collective.

    Args:
        memory: destination of the copy; the caller must make sure that the previous snapshot has been written.

    Returns:
        DTensors of global shape.
    """
    return as_dtensors(engine.module, engine.state(_own_share(engine.module), memory.copy))


def reserve(engine: TrainingEngine, memory: HostMemory) -> None:
    """Allocate the host memory for the first snapshot."""
    share = _own_share(engine.module).items()
    kinds = {True: ("model", *MOMENTS), False: ("model",)}
    memory.reserve({f"{kind}.{name}": stored.size for name, stored in share for kind in kinds[stored.is_trained]})


def _own_share(model: torch.nn.Module) -> dict[str, StoredTensor]:
    """Return this rank's tensors, assigned so that data-parallel ranks write about the same number of elements."""
    from megatron_mosa.model import stored_tensors  # imports Megatron-core, which takes longer than reading metadata

    group = data_parallel_group()
    loads, mine = [0] * group.size(), {}
    for name, stored in sorted(stored_tensors(model).items(), key=lambda item: (-item[1].size, item[0])):
        rank = loads.index(min(loads))
        loads[rank] += stored.size
        if rank == group.rank():
            mine[name] = stored
    return mine


def write_state(state: dict[str, Tensor], path: Path, group: ProcessGroup | None) -> None:
    """Write a snapshot to ``path/state``; collective over all ranks.

    Raises:
        StorageError: on every rank, if any rank failed to write.
    """
    try:
        dcp.save(state, checkpoint_id=path / "state", process_group=group)
    except CheckpointException as error:  # the same on every rank
        for rank, (cause, _) in error.failures.items():
            if is_storage_failure(cause):
                raise StorageError(f"rank {rank}: {first_line(cause)}") from None
        raise


def read_state(engine: TrainingEngine, path: Path, optimizer_step: int) -> None:
    """Load the engine's state from ``path``, whatever layout wrote it; collective over all ranks."""
    state = engine.state()
    view = as_dtensors(engine.module, state)
    dcp.load(view, storage_reader=SafeReader(path / "state"))
    engine.load_state(state, optimizer_step)


def load_initial_weights(engine: TrainingEngine, folder: Path) -> None:
    """Load weights, and thresholds if the checkpoint has any, into the engine, with fresh moments.

    Reads checkpoints of any layout; collective over all ranks.
    """
    state = engine.state()
    found = StateReader(folder).tensors
    weights = {key: tensor for key, tensor in state.items() if key.startswith("model.") and key in found}
    dcp.load(as_dtensors(engine.module, weights), storage_reader=SafeReader(folder / "state"))
    engine.load_state(state, optimizer_step=0)


def write_metadata(metadata: Metadata, path: Path) -> None:
    """Write ``metadata.json`` into a checkpoint folder."""
    (path / METADATA).write_text(json.dumps(asdict(metadata), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_metadata(path: Path) -> Metadata:
    """Read ``metadata.json`` of a checkpoint folder.

    Raises:
        DamagedError: the file is missing or damaged.
        UserError: the format is newer than this version supports.
    """
    file = path / METADATA
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
        if int(version) <= FORMAT_VERSION:
            return Metadata(**content)
    except OSError as error:
        raise DamagedError(f"metadata.json cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"metadata.json is damaged ({type(error).__name__}: {error})") from None
    raise UserError(
        f"checkpoint '{path}' has format version {version}, but this megatron_mosa reads versions up to "
        f"{FORMAT_VERSION}; update megatron_mosa"
    )


def as_dtensors(model: torch.nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Wrap (part of) an engine's state as DTensors of global shape over the tensor-parallel group, without copies."""
    from torch.distributed.device_mesh import DeviceMesh  # slow to import
    from torch.distributed.tensor import DTensor, Replicate, Shard

    from megatron_mosa.model import stored_tensors

    # The process group handles communication; the mesh only describes CPU tensors, and DCP itself moves no tensors.
    mesh = DeviceMesh.from_group(tensor_parallel_group(), "cpu")
    tensors = stored_tensors(model)
    view: dict[str, Tensor] = {}
    for key, tensor in state.items():
        partition = tensors[key.partition(".")[2]].partition
        if partition is None:
            view[key] = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
        elif partition.stride == 1:
            view[key] = DTensor.from_local(tensor, mesh, [Shard(partition.dim)], run_check=False)
        else:
            shard = [Shard(partition.unfolded_dim)]
            view[key] = DTensor.from_local(partition.unfold(tensor), mesh, shard, run_check=False)
    return view
