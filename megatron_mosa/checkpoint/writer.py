"""Write a checkpoint's state one tensor at a time, without a GPU, an engine or process groups."""

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

from megatron_mosa.checkpoint.manifest import FileRecord, sync_and_evict
from megatron_mosa.checkpoint.reader import TensorInfo
from megatron_mosa.errors import StorageError
from megatron_mosa.utils import file_problem, free_megabytes


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
    """Write ``state/`` of a checkpoint folder, reading one tensor at a time in the given order.

    One thread reads the next tensor while another writes the current one and a third syncs the previous one to disk.

    Args:
        tensors: shapes and dtypes of all tensors, by key.
        read: reads the tensor of a key.
        checkpoint: the checkpoint folder.
        cuts: for tensors to split: the dimension and the number of equal shards, each written to its own file.
        below: subfolder for the state; "": the checkpoint folder itself.
        read_part: reads a single shard; None: shards are sliced from the whole tensor.
        objects: other objects to store, by key.

    Returns:
        Records of all files, by their paths relative to ``checkpoint``.

    Raises:
        StorageError: writing failed.
    """
    # Torch holds the content of a file in memory until the file is closed: use one file per tensor.
    writer = dcp.FileSystemWriter(checkpoint / below, single_file_per_rank=False, sync_files=False)
    state: dict[str, Any] = {k: torch.empty(info.shape, dtype=info.dtype, device="meta") for k, info in tensors.items()}
    state |= objects or {}
    try:
        with (
            warnings.catch_warnings(),
            closing(_ReadingPlanner(read, cuts or {}, read_part)) as planner,
            closing(_SyncedFiles()) as files,
        ):
            warnings.simplefilter("ignore")  # torch warns if no process group exists
            writer.fs = files
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
            records = files.records()
    except CheckpointException as error:
        raised = next(iter(error.failures.values()))[0]
        if is_storage_failure(raised):
            raise StorageError(storage_problem(raised, checkpoint)) from None
        raise raised from None
    except OSError as error:
        raise StorageError(storage_problem(error, checkpoint)) from None
    return {path.relative_to(checkpoint).as_posix(): record for path, record in records.items()}


def is_storage_failure(error: BaseException) -> bool:
    """Whether a write error comes from the file system."""
    return isinstance(error, OSError) or any(phrase in str(error) for phrase in _ARCHIVE_ERRORS)


def storage_problem(error: BaseException, folder: Path) -> str:
    """Return why writing to ``folder`` failed, in one line."""
    if isinstance(error, OSError):
        return file_problem(error, has_remedy=False)
    return f"the disk did not take all of a file ({free_megabytes(folder)} MB free)"  # torch says only where it stopped


_ARCHIVE_ERRORS = ("PytorchStreamWriter failed", "inline_container")
"""Words of the RuntimeErrors that torch's archive writer makes of errors of the file system."""


class _SyncedFiles(FileSystem):
    """Torch's file system; syncs and hashes every written file in a thread (``sync_and_evict``)."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._records: dict[Path, Future[FileRecord]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        """Open a file; once it has been written, sync and hash it in the thread."""
        with super().create_stream(path, mode) as stream:
            yield stream
        if "w" in mode:
            self._records[Path(path)] = self._pool.submit(sync_and_evict, Path(path))

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Wait until the file is on disk, then rename it; torch renames the complete index into place."""
        self._records[Path(path)].result()
        super().rename(path, new_path)
        self._records[Path(new_path)] = self._records.pop(Path(path))

    def records(self) -> dict[Path, FileRecord]:
        """Wait until all files are on disk, and return their records.

        Raises:
            OSError: a file could not be synced or read.
        """
        return {path: future.result() for path, future in self._records.items()}

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(cancel_futures=True)


_ReadRequest = tuple[str, int | None]  # a key, and which of its shards; None: the whole tensor


class _ReadAhead:
    """Prefetches tensors in a known order: reads the next one while the current one is in use."""

    def __init__(self, read: Callable[[str, int | None], Tensor], order: Iterable[_ReadRequest]) -> None:
        self._read = read
        self._order = iter(order)
        self._pool = ThreadPoolExecutor(1)
        self._prefetch()

    def _prefetch(self) -> None:
        self._expected = next(self._order, None)
        if self._expected is not None:
            self._next = self._pool.submit(self._read, *self._expected)

    def take(self, request: _ReadRequest) -> Tensor:
        """Return the next tensor, which must be the requested one, and start reading the one after it."""
        assert request == self._expected, f"torch asked for {request} instead of {self._expected}"
        tensor = self._next.result()
        self._prefetch()
        return tensor

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(cancel_futures=True)


class _ReadingPlanner(dcp.DefaultSavePlanner):
    """Reads a tensor only when it is written, and splits it into shards where requested."""

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
        self._last: tuple[_ReadRequest, Tensor] | None = None  # later shards may be sliced from it

    def create_local_plan(self) -> SavePlan:
        """Extend the default plan with one item per shard, and start reading ahead."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[part for item in plan.items for part in self._parts(item)])
        tensors = [item for item in self.plan.items if item.type is not WriteItemType.BYTE_IO]
        self._ahead = _ReadAhead(self._fetch, dict.fromkeys(map(self._request, tensors)))
        return self.plan

    def close(self) -> None:
        """Stop the reading thread."""
        if self._ahead is not None:
            self._ahead.close()

    def _request(self, item: WriteItem) -> _ReadRequest:
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
        """Return the tensor or shard to write."""
        if write_item.type is WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        assert self._ahead is not None and write_item.tensor_data is not None, "create_local_plan must run first"
        request = key, part = self._request(write_item)
        if self._last is None or self._last[0] != request:
            self._last = None  # free it before taking the next one
            self._last = request, self._ahead.take(request)
        tensor = self._last[1]
        if key not in self._cuts or part is not None:
            self._last = None
            return tensor.contiguous()
        chunk, (dim, _) = write_item.tensor_data.chunk, self._cuts[key]
        return tensor.narrow(dim, chunk.offsets[dim], chunk.sizes[dim]).clone()
