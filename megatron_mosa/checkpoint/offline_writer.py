"""Writing a checkpoint's state without a GPU, an engine or process groups, one tensor at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron_mosa.checkpoint.manifest import FileRecord, settle
from megatron_mosa.checkpoint.offline import TensorInfo, cause_of
from megatron_mosa.errors import StorageError


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

    One thread reads the next tensor, one writes the present one, one sees the last onto the disk.

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
    writer = dcp.FileSystemWriter(checkpoint / below, single_file_per_rank=False, sync_files=False)
    state: dict[str, Any] = {k: torch.empty(info.shape, dtype=info.dtype, device="meta") for k, info in tensors.items()}
    state |= objects or {}
    try:
        with (
            warnings.catch_warnings(),
            closing(_ReadingPlanner(read, cuts or {}, read_part)) as planner,
            closing(_SettledFiles()) as files,
        ):
            warnings.simplefilter("ignore")  # that there is no process group
            writer.fs = files
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
            records = files.records()
    except CheckpointException as error:
        raised = next(iter(error.failures.values()))[0]
        if is_storage_failure(raised):
            raise StorageError(cause_of(error)) from None
        raise raised from None
    except OSError as error:
        raise StorageError(cause_of(error)) from None
    return {path.relative_to(checkpoint).as_posix(): record for path, record in records.items()}


def is_storage_failure(error: BaseException) -> bool:
    """Whether an error in writing is the file system's."""
    # Torch's archive writer makes a RuntimeError of what the file system says.
    words = ("PytorchStreamWriter failed", "inline_container")
    return isinstance(error, OSError) or any(word in str(error) for word in words)


class _SettledFiles(FileSystem):
    """Settles the files that are written, in a thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._records: dict[Path, Future[FileRecord]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        """As FileSystem; a file that was written is settled."""
        with super().create_stream(path, mode) as stream:
            yield stream
        if "w" in mode:
            self._records[Path(path)] = self._pool.submit(settle, Path(path))

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """As FileSystem: the index gets its name when it is complete."""
        self._records[Path(path)].result()
        super().rename(path, new_path)
        self._records[Path(new_path)] = self._records.pop(Path(path))

    def records(self) -> dict[Path, FileRecord]:
        """Of all files, when they are on the disk.

        Raises:
            OSError: one is not.
        """
        return {path: future.result() for path, future in self._records.items()}

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)


_Reading = tuple[str, int | None]  # a key, and which of its parts


class _ReadAhead:
    """Tensors in a known order: the next one is read while the present one is in use."""

    def __init__(self, read: Callable[[str, int | None], Tensor], order: Iterable[_Reading]) -> None:
        self._read = read
        self._order = iter(order)
        self._pool = ThreadPoolExecutor(1)
        self._begin_next()

    def _begin_next(self) -> None:
        self._expected = next(self._order, None)
        if self._expected is not None:
            self._next = self._pool.submit(self._read, *self._expected)

    def take(self, reading: _Reading) -> Tensor:
        """The next in the order, which is this one."""
        assert reading == self._expected, f"torch asks for {reading}, not for {self._expected}"
        tensor = self._next.result()
        self._begin_next()
        return tensor

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)


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
        self._ahead: _ReadAhead | None = None
        self._last: tuple[_Reading, Tensor] | None = None  # parts may be taken from it

    def create_local_plan(self) -> SavePlan:
        """As DefaultSavePlanner, with an item for each part."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[part for item in plan.items for part in self._parts(item)])
        tensors = [item for item in self.plan.items if item.type is not WriteItemType.BYTE_IO]
        self._ahead = _ReadAhead(self._fetch, dict.fromkeys(map(self._reading, tensors)))
        return self.plan

    def close(self) -> None:
        """End the thread that reads."""
        if self._ahead is not None:
            self._ahead.close()

    def _reading(self, item: WriteItem) -> _Reading:
        key = item.index.fqn
        return key, item.index.index if self._read_part is not None and key in self._cuts else None

    def _fetch(self, key: str, part: int | None) -> Tensor:
        return self._read(key) if part is None or self._read_part is None else self._read_part(key, part)

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
        if write_item.type is WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        assert self._ahead is not None and write_item.tensor_data is not None, "a plan comes first"
        reading = key, part = self._reading(write_item)
        if self._last is None or self._last[0] != reading:
            self._last = None  # not kept beside the next
            self._last = reading, self._ahead.take(reading)
        tensor = self._last[1]
        if key not in self._cuts or part is not None:
            self._last = None
            return tensor.contiguous()
        chunk, (dim, _) = write_item.tensor_data.chunk, self._cuts[key]
        return tensor.narrow(dim, chunk.offsets[dim], chunk.sizes[dim]).clone()
