"""A folder of safetensors: what is in them, and one tensor at a time; written in shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mosa.checkpoint.manifest import DamagedError, FileRecord, settle
from megatron_mosa.errors import StorageError, UserError

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 1 << 28  # a tensor that is larger has a shard of its own


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """In the words of safetensors, such as "BF16"."""

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()


def shard_names(folder: Path) -> list[str]:
    """The files that hold the tensors: ``model.safetensors``, or all that ``model.safetensors.index.json`` names.

    The order is that of transformers, whose ``save_pretrained`` leaves an older index beside a new file.

    Raises:
        UserError: there are no safetensors.
        DamagedError: the index cannot be read, or names a file elsewhere.
    """
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    if not (folder / INDEX).is_file():
        raise UserError(f"'{folder}' holds neither {INDEX} nor {_SINGLE}; save the model with safetensors")
    names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name:
            raise DamagedError(f"{INDEX} names a file outside of the folder: {name}")
    return names


class SafetensorsFolder:
    """All tensors of a folder."""

    def __init__(self, folder: Path) -> None:
        """Read index and headers alone.

        Raises:
            UserError: there are no safetensors.
            DamagedError: a file is missing or damaged; says which.
        """
        self._folder = folder
        self.tensors: dict[str, Header] = {}
        for name in shard_names(folder):
            with self._open(name) as file:
                for key in file.keys():  # noqa: SIM118
                    view = file.get_slice(key)
                    self.tensors[key] = Header(name, tuple(view.get_shape()), view.get_dtype())

    def read(self, key: str) -> Tensor:
        """One tensor, as it is kept."""
        # Opened anew each time: what an open file has read stays in memory.
        with self._open(self.tensors[key].file) as file:
            return file.get_tensor(key)

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._folder / name, framework="pt") as file:
                yield file
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror or error})") from None
        except SafetensorError as error:
            raise DamagedError(f"{name} is damaged ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        DamagedError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DamagedError(f"{path.name} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path.name} is damaged (it holds a {type(content).__name__})")
    return content


@dataclass(frozen=True)
class Piece:
    """Tensors that are read together and lie in one shard."""

    nbytes: int
    """Of all of them."""

    read: Callable[[], dict[str, Tensor]]
    """Contiguous, and none of them a view of another."""


def write_shards(pieces: Sequence[Piece], folder: Path) -> dict[str, FileRecord]:
    """Stream pieces into shards, in order, and write the index of them; return the shards' records.

    Raises:
        StorageError: the file system does not take it.
    """
    from megatron_mosa.data.shards import progress

    shards = list(_plan(pieces))
    places: dict[str, str] = {}
    records: dict[str, FileRecord] = {}
    total = sum(piece.nbytes for piece in pieces)
    # A shard is written while the next is read: two in memory, and the disk is never waited for alone.
    with progress(total, "exporting") as bar, ThreadPoolExecutor(1) as disk:
        written: Future[None] = Future()
        written.set_result(None)
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for piece in shard:
                tensors |= piece.read()
            written.result()
            written = disk.submit(_write_shard, tensors, folder / name, records)
            places |= dict.fromkeys(tensors, name)
            bar.update(sum(tensor.nbytes for tensor in tensors.values()))
        written.result()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return records


def _write_shard(tensors: dict[str, Tensor], file: Path, records: dict[str, FileRecord]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(f"{file.name} cannot be written ({error})") from None
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes files for the owner alone
    records[file.name] = settle(file)


def _plan(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces in order, in shards of at most ``_SHARD_BYTES`` where one is no larger by itself."""
    shard: list[Piece] = []
    size = 0
    for piece in pieces:
        if shard and size + piece.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(piece)
        size += piece.nbytes
    yield shard
