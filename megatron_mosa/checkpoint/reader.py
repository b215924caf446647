"""Read a checkpoint's state one tensor at a time, without a GPU, an engine or process groups.

Keys are ``model.NAME`` (fp32 master weights), ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` (Adam's moments), with
Megatron's global names and the global shapes.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import Metadata as StateMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mosa.checkpoint.file_slice import FileSlice, find_corruption
from megatron_mosa.checkpoint.index import MOMENTS, load_index, require_index_class
from megatron_mosa.checkpoint.manifest import DamagedError


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class StateReader:
    """Reads ``state/`` of a checkpoint folder, or another folder that torch's distributed checkpoint wrote."""

    def __init__(self, checkpoint: Path, below: str = "state") -> None:
        """Read only the index.

        Args:
            checkpoint: the checkpoint folder.
            below: subfolder with the state; "": the checkpoint folder itself.

        Raises:
            DamagedError: the index is missing, damaged, or contains classes that an index does not need.
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
        """The tensors under ``model.``, keyed by their names without this prefix."""
        prefix = "model."
        return {key.removeprefix(prefix): info for key, info in self.tensors.items() if key.startswith(prefix)}

    @property
    def has_optimizer_state(self) -> bool:
        """Whether the checkpoint contains Adam's moments."""
        return any(key.partition(".")[0] in MOMENTS for key in self.tensors)

    def read(self, key: str, row: int | None = None) -> Tensor:
        """Read a whole tensor, or one row of its first dimension, assembled from the shards that the ranks wrote.

        Raises:
            KeyError: unknown name.
            DamagedError: the tensor cannot be read; names the files that hold it.
        """
        info = self.tensors[key]
        tensor = torch.empty(info.shape if row is None else info.shape[1:], dtype=info.dtype)
        planner = None if row is None else _RowPlanner(tensor, row)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns if no process group exists
                dcp.load({key: tensor}, storage_reader=self._reader, planner=planner, no_dist=True)
        except (CheckpointException, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            stored = self._metadata.storage_data.items()
            files = sorted({self._file(info) for index, info in stored if index.fqn == key})
            raise DamagedError(f"{', '.join(files)}: '{key}' cannot be read ({cause_of(error)})") from None
        return tensor

    def read_bytes(self, key: str) -> bytes | None:
        """Read the value of a key that does not hold a tensor; None for an unknown key.

        Raises:
            DamagedError: the value cannot be read.
        """
        for index, info in self._metadata.storage_data.items():
            if index.fqn == key:
                try:
                    with (Path(self._reader.path) / info.relative_path).open("rb") as file:
                        return BufferedReader(FileSlice(file, info.offset, info.length)).read()
                except OSError as error:
                    raise DamagedError(f"{self._file(info)} cannot be read ({error.strerror})") from None
        return None

    def find_corruption(self, keys: Collection[str], advance: Callable[[int], object]) -> str | None:
        """Verify the checksums of some tensors' shards; describe the first mismatch, or return None.

        Args:
            keys: keys of the tensors to verify.
            advance: called with the number of bytes just read.
        """
        for index, info in self._metadata.storage_data.items():
            if index.fqn not in keys:
                continue
            try:
                with (Path(self._reader.path) / info.relative_path).open("rb") as file:
                    damage = find_corruption(BufferedReader(FileSlice(file, info.offset, info.length)), advance)
            except OSError as error:
                damage = f"cannot be read ({error.strerror})"
            if damage is not None:
                return f"{self._file(info)} {damage}"
        return None

    def _file(self, info: Any) -> str:
        return f"{Path(self._reader.path).name}/{info.relative_path}"


class _RowPlanner(dcp.DefaultLoadPlanner):
    """Reads only one row [...] of a tensor [L, ...]."""

    def __init__(self, tensor: Tensor, row: int) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensor = tensor
        self._row = row

    def create_local_plan(self) -> LoadPlan:
        """Plan to read only the chunks that contain the row."""
        (key,) = self.state_dict
        offsets = torch.Size([self._row, *[0] * self._tensor.dim()])
        chunk = ChunkStorageMetadata(offsets, torch.Size([1, *self._tensor.shape]))
        entry = cast(StateMetadata, self.metadata).state_dict_metadata[key]
        return LoadPlan(create_read_items_for_chunk_list(key, cast(TensorStorageMetadata, entry), [chunk]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the destination of the row, [1, ...]."""
        return self._tensor[None]


class SafeReader(dcp.FileSystemReader):
    """Torch's reader, restricted to the classes of an index; the original runs any code that a pickled index names."""

    _index: StateMetadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> StateMetadata:
        """Read the index with a restricted unpickler, and cache it.

        Raises:
            DamagedError: the index is missing, damaged, or refers to other classes or to files outside of its folder.
        """
        if self._index is None:
            self._index = cast(StateMetadata, load_index(Path(self.path), _IndexUnpickler))
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Allow only the classes of an index and torch's dtypes."""
        require_index_class(module, name, lambda name: isinstance(getattr(torch, name, None), torch.dtype))
        return super().find_class(module, name)


def cause_of(error: BaseException) -> str:
    """Return the first line of an error's message; for a CheckpointException, of its first cause."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
