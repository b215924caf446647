"""A checkpoint's state without a GPU, an engine or process groups: read and written one tensor at a time.

Keys are ``model.NAME`` (fp32 master weights), ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` (Adam's moments), with
Megatron's global names and the global shapes.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader, BytesIO
from pathlib import Path, PurePath
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import Metadata as StateMetadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mosa.checkpoint.manifest import DamagedError, FileRecord, settle
from megatron_mosa.checkpoint.saved_objects import Window, find_change
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
        """Whether there are Adam's moments for every weight."""
        return all(f"{moment}.{name}" in self.tensors for name in self.weights for moment in MOMENTS)

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
            raise DamagedError(f"{', '.join(files)}: '{key}' cannot be read ({_cause(error)})") from None
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


def write_state_offline(
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    checkpoint: Path,
    cuts: Mapping[str, tuple[int, int]] | None = None,
    *,
    below: str = "state",
    read_part: Callable[[str, int], Tensor] | None = None,
    objects: Mapping[str, Any] | None = None,
) -> dict[str, FileRecord]:
    """Write ``state/`` of a checkpoint folder from tensors that are asked for one at a time, in the order given.

    Args:
        tensors, read: keys, and how to read one.
        checkpoint: the folder.
        cuts: dimension and number of equal parts of those tensors that are written in parts, a file each.
        below: where in the folder; "": in itself.
        read_part: how to read one of the parts; None: as a part of the whole.
        objects: what else to keep, by keys of their own.

    Returns:
        Records of all files, by their paths from ``checkpoint``.

    Raises:
        StorageError: the file system does not take it.
    """
    # Torch keeps what it writes into one file until the file is closed: one a tensor.
    writer = dcp.FileSystemWriter(checkpoint / below, single_file_per_rank=False)
    writer.fs = files = _SettledFiles()
    state: dict[str, Any] = {k: torch.empty(info.shape, dtype=info.dtype, device="meta") for k, info in tensors.items()}
    state |= objects or {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            dcp.save(state, storage_writer=writer, planner=_ReadingPlanner(read, cuts or {}, read_part), no_dist=True)
    except CheckpointException as error:
        raised = next(iter(error.failures.values()))[0]
        if is_storage_failure(raised):
            raise StorageError(_cause(error)) from None
        raise raised from None
    return {path.relative_to(checkpoint).as_posix(): record for path, record in files.records.items()}


def is_storage_failure(error: BaseException) -> bool:
    """Whether an error in writing is the file system's."""
    # Torch's archive writer makes a RuntimeError of what the file system says.
    words = ("PytorchStreamWriter failed", "inline_container")
    return isinstance(error, OSError) or any(word in str(error) for word in words)


class _SettledFiles(FileSystem):
    """Keeps records of the files that are written."""

    def __init__(self) -> None:
        self.records: dict[Path, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        """As FileSystem; a file that was written is settled."""
        with super().create_stream(path, mode) as stream:
            yield stream
        if "w" in mode:
            self.records[Path(path)] = settle(Path(path))

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """As FileSystem: the index gets its name when it is complete."""
        super().rename(path, new_path)
        self.records[Path(new_path)] = self.records.pop(Path(path))


class _ReadingPlanner(dcp.DefaultSavePlanner):
    """Takes a tensor's value from a function at the moment when it is written, in parts where it is to be cut."""

    def __init__(
        self,
        read: Callable[[str], Tensor],
        cuts: Mapping[str, tuple[int, int]],
        read_part: Callable[[str, int], Tensor] | None,
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._read = read
        self._read_part = read_part
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

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        """The tensor, or its part."""
        key = write_item.index.fqn
        if write_item.type is WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        if self._read_part is not None and key in self._cuts and write_item.index.index is not None:
            return self._read_part(key, write_item.index.index).contiguous()
        if self._whole is None or self._whole[0] != key:
            self._whole = key, self._read(key)
        tensor = self._whole[1]
        if key not in self._cuts or write_item.tensor_data is None:
            self._whole = None
            return tensor.contiguous()
        chunk, (dim, _) = write_item.tensor_data.chunk, self._cuts[key]
        return tensor.narrow(dim, chunk.offsets[dim], chunk.sizes[dim]).clone()


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
                raise DamagedError(f"{name} is damaged ({_cause(error)})") from None
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


def _cause(error: BaseException) -> str:
    """One line for what went wrong inside torch."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
