"""A checkpoint's state without a GPU, an engine or process groups: read and written one tensor at a time.

Keys are ``model.NAME`` (fp32 master weights), ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` (Adam's moments), with
Megatron's global names and the global shapes.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import Metadata as StateMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron_mosa.checkpoint.manifest import DamagedError
from megatron_mosa.errors import StorageError

MOMENTS = ("exp_avg", "exp_avg_sq")

_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # of a name in a table
    ("pathlib", "PosixPath"),
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()


class StateReader:
    """The ``state/`` of a checkpoint folder."""

    def __init__(self, checkpoint: Path) -> None:
        """Read the index alone.

        Raises:
            DamagedError: it is missing, damaged, or holds what an index does not.
        """
        self._reader = SafeReader(checkpoint / "state")
        self._metadata = self._reader.read_metadata()
        self.tensors = {
            key: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @property
    def weights(self) -> dict[str, TensorInfo]:
        """The tensors under ``model.``, by their names without it."""
        prefix = "model."
        return {key.removeprefix(prefix): info for key, info in self.tensors.items() if key.startswith(prefix)}

    @property
    def has_optimizer_state(self) -> bool:
        """Whether there are Adam's moments for every weight."""
        return all(f"{moment}.{name}" in self.tensors for name in self.weights for moment in MOMENTS)

    def read(self, key: str) -> Tensor:
        """One whole tensor, put together of the parts that the ranks wrote.

        Raises:
            KeyError: there is none of that name.
            DamagedError: it cannot be read; names the files that hold it.
        """
        info = self.tensors[key]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is no process group
                dcp.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            files = {info.relative_path for index, info in self._metadata.storage_data.items() if index.fqn == key}
            raise DamagedError(
                f"state/{', state/'.join(sorted(files))}: '{key}' cannot be read ({_cause(error)})"
            ) from None
        return tensor


def write_state_offline(
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    checkpoint: Path,
    cuts: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Write ``state/`` of a checkpoint folder from tensors that are asked for one at a time, in the order given.

    Args:
        tensors, read: keys, and how to read one.
        checkpoint: the folder.
        cuts: dimension and number of equal parts of those tensors that are written in parts, a file each.

    Raises:
        StorageError: the file system does not take it.
    """
    # Torch keeps what it writes into one file until the file is closed: one a tensor.
    writer = dcp.FileSystemWriter(checkpoint / "state", single_file_per_rank=False)
    state = {key: torch.empty(info.shape, dtype=info.dtype, device="meta") for key, info in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            dcp.save(state, storage_writer=writer, planner=_ReadingPlanner(read, cuts or {}), no_dist=True)
    except CheckpointException as error:
        raised = next(iter(error.failures.values()))[0]
        if is_storage_failure(raised):
            raise StorageError(_cause(error)) from None
        raise raised from None


def is_storage_failure(error: BaseException) -> bool:
    """Whether an error in writing is the file system's."""
    # Torch's archive writer makes a RuntimeError of what the file system says.
    words = ("PytorchStreamWriter failed", "inline_container")
    return isinstance(error, OSError) or any(word in str(error) for word in words)


class _ReadingPlanner(dcp.DefaultSavePlanner):
    """Takes a tensor's value from a function at the moment when it is written, in parts where it is to be cut."""

    def __init__(self, read: Callable[[str], Tensor], cuts: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(flatten_state_dict=False)
        self._read = read
        self._cuts = cuts
        self._whole: tuple[str, Tensor] | None = None  # what parts were last taken from

    def create_local_plan(self) -> SavePlan:
        """As DefaultSavePlanner, with an item for each part."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[part for item in plan.items for part in self._parts(item)])
        return self.plan

    def _parts(self, item: WriteItem) -> list[WriteItem]:
        if item.index.fqn not in self._cuts or item.tensor_data is None:
            return [item]
        dim, number = self._cuts[item.index.fqn]
        sizes = list(item.tensor_data.size)
        sizes[dim] //= number
        parts = []
        for part in range(number):
            offsets = [0] * len(sizes)
            offsets[dim] = part * sizes[dim]
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            index = replace(item.index, offset=chunk.offsets, index=part)
            data = replace(item.tensor_data, chunk=chunk)
            parts.append(replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data))
        return parts

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The tensor, or its part."""
        key = write_item.index.fqn
        if self._whole is None or self._whole[0] != key:
            self._whole = key, self._read(key)
        tensor = self._whole[1]
        if key not in self._cuts or write_item.tensor_data is None:
            self._whole = None
            return tensor.contiguous()
        chunk, (dim, _) = write_item.tensor_data.chunk, self._cuts[key]
        return tensor.narrow(dim, chunk.offsets[dim], chunk.sizes[dim]).clone()


class SafeReader(dcp.FileSystemReader):
    """Torch's reader, which would run any code that an index asks for, kept to what an index is made of."""

    _index: StateMetadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> StateMetadata:
        """As FileSystemReader, once."""
        if self._index is None:
            file = Path(self.path) / ".metadata"
            try:
                with file.open("rb") as stream:
                    self._index = _checked(_IndexUnpickler(stream).load())
            except OSError as error:
                raise DamagedError(f"state/.metadata cannot be read ({error.strerror})") from None
            except DamagedError:
                raise
            except Exception as error:  # whatever a broken pickle makes of itself
                raise DamagedError(f"state/.metadata is damaged ({_cause(error)})") from None
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The classes of an index, and torch's element types."""
        if (module, name) in _METADATA_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise DamagedError(f"state/.metadata asks for {module}.{name}, which no checkpoint needs: refused, not loaded")


def _checked(index: Any) -> StateMetadata:
    if not isinstance(index, StateMetadata) or not isinstance(index.storage_data, dict):
        raise DamagedError(f"state/.metadata is damaged (it holds a {type(index).__name__})")
    for info in index.storage_data.values():
        if PurePath(info.relative_path).name != info.relative_path:
            raise DamagedError(f"state/.metadata names a file outside of state/: {info.relative_path}")
    return index


def _cause(error: BaseException) -> str:
    """One line for what went wrong inside torch."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
