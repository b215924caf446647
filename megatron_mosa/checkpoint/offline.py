"""A checkpoint's state without a GPU, an engine or process groups: read and written one tensor at a time.

Keys are ``model.NAME`` (fp32 master weights), ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` (Adam's moments), with
Megatron's global names and the global shapes.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePath
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import Metadata as StateMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mosa.checkpoint.manifest import DamagedError
from megatron_mosa.checkpoint.saved_objects import Window, find_change

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
} | {
    ("torch.distributed.checkpoint.planner", name)  # Megatron-LM keeps the ranks' plans with the index
    for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
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
    """The ``state/`` of a checkpoint folder, or what torch's distributed checkpoint wrote into another."""

    def __init__(self, checkpoint: Path, below: str = "state") -> None:
        """Read the index alone.

        Args:
            checkpoint: the folder.
            below: where in it; "": in itself.

        Raises:
            DamagedError: it is missing, damaged, or holds what an index does not.
        """
        self._reader = SafeReader(checkpoint / below)
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
        """Whether there are Adam's moments."""
        return any(key.partition(".")[0] in MOMENTS for key in self.tensors)

    def read(self, key: str, row: int | None = None) -> Tensor:
        """One whole tensor, or one row of its first dimension, put together of the parts that the ranks wrote.

        Raises:
            KeyError: there is none of that name.
            DamagedError: it cannot be read; names the files that hold it.
        """
        info = self.tensors[key]
        tensor = torch.empty(info.shape if row is None else info.shape[1:], dtype=info.dtype)
        planner = None if row is None else _RowPlanner(tensor, row)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is no process group
                dcp.load({key: tensor}, storage_reader=self._reader, planner=planner, no_dist=True)
        except (CheckpointException, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            stored = self._metadata.storage_data.items()
            files = sorted({self._file(info) for index, info in stored if index.fqn == key})
            raise DamagedError(f"{', '.join(files)}: '{key}' cannot be read ({cause_of(error)})") from None
        return tensor

    def read_bytes(self, key: str) -> bytes | None:
        """What is kept under a key that is no tensor's; None: there is no such key.

        Raises:
            DamagedError: it cannot be read.
        """
        for index, info in self._metadata.storage_data.items():
            if index.fqn == key:
                try:
                    with (Path(self._reader.path) / info.relative_path).open("rb") as file:
                        return BufferedReader(Window(file, info.offset, info.length)).read()
                except OSError as error:
                    raise DamagedError(f"{self._file(info)} cannot be read ({error.strerror})") from None
        return None

    def find_change(self, keys: Collection[str], advance: Callable[[int], object]) -> str | None:
        """What is wrong with the parts of some tensors by their checksums, as ``saved_objects.find_change``."""
        for index, info in self._metadata.storage_data.items():
            if index.fqn not in keys:
                continue
            try:
                with (Path(self._reader.path) / info.relative_path).open("rb") as file:
                    change = find_change(BufferedReader(Window(file, info.offset, info.length)), advance)
            except OSError as error:
                change = f"cannot be read ({error.strerror})"
            if change is not None:
                return f"{self._file(info)} {change}"
        return None

    def _file(self, info: Any) -> str:
        return f"{Path(self._reader.path).name}/{info.relative_path}"


class _RowPlanner(dcp.DefaultLoadPlanner):
    """Reads one row [...] of a tensor [L, ...] alone."""

    def __init__(self, tensor: Tensor, row: int) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensor = tensor
        self._row = row

    def create_local_plan(self) -> LoadPlan:
        """The parts of which the row is made."""
        (key,) = self.state_dict
        offsets = torch.Size([self._row, *[0] * self._tensor.dim()])
        chunk = ChunkStorageMetadata(offsets, torch.Size([1, *self._tensor.shape]))
        entry = cast(StateMetadata, self.metadata).state_dict_metadata[key]
        return LoadPlan(create_read_items_for_chunk_list(key, cast(TensorStorageMetadata, entry), [chunk]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where the row is read to."""
        return self._tensor[None]


class SafeReader(dcp.FileSystemReader):
    """Torch's reader, which would run any code that an index asks for, kept to what an index is made of."""

    _index: StateMetadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> StateMetadata:
        """As FileSystemReader, once."""
        if self._index is None:
            file = Path(self.path) / ".metadata"
            name = f"{Path(self.path).name}/.metadata"
            try:
                with file.open("rb") as stream:
                    self._index = _checked(_IndexUnpickler(stream).load())
            except OSError as error:
                raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
            except DamagedError as error:
                raise DamagedError(f"{name} {error}") from None
            except Exception as error:  # whatever a broken pickle makes of itself
                raise DamagedError(f"{name} is damaged ({cause_of(error)})") from None
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The classes of an index, and torch's element types."""
        if (module, name) in _METADATA_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise DamagedError(f"asks for {module}.{name}, which no checkpoint needs: refused, not loaded")


def _checked(index: Any) -> StateMetadata:
    if not isinstance(index, StateMetadata) or not isinstance(index.storage_data, dict):
        raise DamagedError(f"is damaged (it holds a {type(index).__name__})")
    for info in index.storage_data.values():
        if PurePath(info.relative_path).name != info.relative_path:
            raise DamagedError(f"names a file outside of its folder: {info.relative_path}")
    return index


def cause_of(error: BaseException) -> str:
    """One line for what went wrong inside torch."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
