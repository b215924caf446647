"""Define checkpoint format 2, which is independent of the parallel layout.

A checkpoint is a folder ``step-00000100`` with ``metadata.json``, ``state/`` and ``manifest.json``. The state is
written by torch's distributed checkpoint (DCP): for each parameter the fp32 master weight and Adam's moments, under
Megatron's global names and global shapes, so that it can be read at any tensor- and data-parallel size. The manifest
(sizes and hashes of all files) is written last, and then the folder is renamed into place, so a folder under its final
name was complete when it was published. Format 1 had no manifest; it still loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mosa.checkpoint.host_memory import HostMemory
from megatron_mosa.checkpoint.index import MOMENTS
from megatron_mosa.errors import StorageError
from megatron_mosa.parallel import data_parallel_group, tensor_parallel_group

if TYPE_CHECKING:
    from megatron_mosa.engine import TrainingEngine
    from megatron_mosa.model import StoredTensor


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
    from torch.distributed import checkpoint as dcp  # slow to import, and a start that only checks needs none of it
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_mosa.checkpoint.writer import is_storage_failure, storage_problem

    try:
        dcp.save(state, checkpoint_id=path / "state", process_group=group)
    except CheckpointException as error:  # the same on every rank
        for rank, (cause, _) in error.failures.items():
            if is_storage_failure(cause):
                raise StorageError(f"rank {rank}: {storage_problem(cause, path)}") from None
        raise RuntimeError(str(error)) from error  # torch's is no Exception, and would pass all handlers


def read_state(engine: TrainingEngine, path: Path, optimizer_step: int) -> None:
    """Load the engine's state from ``path``, whatever layout wrote it; collective over all ranks.

    Raises:
        StorageError: on every rank, if any rank failed to read.
    """
    state = engine.state()
    _load(as_dtensors(engine.module, state), path)
    engine.load_state(state, optimizer_step)


def load_initial_weights(engine: TrainingEngine, folder: Path) -> None:
    """Load weights, and thresholds, biases or centroids if the checkpoint has any, into the engine, with fresh moments.

    Reads checkpoints of any layout; collective over all ranks.

    Raises:
        StorageError: on every rank, if any rank failed to read.
    """
    from megatron_mosa.checkpoint.reader import StateReader

    state = engine.state()
    found = StateReader(folder).tensors
    weights = {key: tensor for key, tensor in state.items() if key.startswith("model.") and key in found}
    _load(as_dtensors(engine.module, weights), folder)
    engine.load_state(state, optimizer_step=0)


def _load(view: dict[str, Tensor], path: Path) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    from megatron_mosa.checkpoint.reader import SafeReader, cause_of

    try:
        dcp.load(view, storage_reader=SafeReader(path / "state"))
    except CheckpointException as error:  # the same on every rank, and no Exception: it would pass all handlers
        raise StorageError(
            f"rank {min(error.failures)} could not read checkpoint '{path}' ({cause_of(error)}); mosa checkpoint "
            "verify says whether it is damaged"
        ) from None


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
