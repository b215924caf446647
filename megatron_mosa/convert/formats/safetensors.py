"""Read a folder of safetensors one tensor at a time, and write one in shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mosa.checkpoint import DamagedError, FileRecord, sync_and_evict
from megatron_mosa.errors import StorageError, UserError
from megatron_mosa.utils import load_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 1 << 28  # a larger tensor gets its own shard


@dataclass(frozen=True)
class Header:
    """File, shape and dtype of a tensor, from a file's header."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    """The name in safetensors files, such as "BF16"."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def shard_names(folder: Path) -> list[str]:
    """Return the files that hold tensors: ``model.safetensors``, or all files in ``model.safetensors.index.json``.

    A single file takes precedence, as in transformers, whose ``save_pretrained`` leaves an older index next to it.

    Raises:
        UserError: the folder contains no safetensors.
        DamagedError: the index cannot be read, or refers to a file outside of the folder.
    """
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    if not (folder / INDEX).is_file():
        how = "without a variant" if any(folder.glob("*.safetensors")) else "with safetensors"
        raise UserError(f"'{folder}' contains neither {INDEX} nor {_SINGLE}; save the model {how}")
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise DamagedError(f"{INDEX} is damaged (it lists no tensors in weight_map)")
    names = sorted(set(map(str, found.values())))
    for name in names:
        if Path(name).name != name:
            raise DamagedError(f"{INDEX} refers to a file outside of the folder: {name}")
        if not name.isprintable():
            raise DamagedError(f"{INDEX} refers to a file whose name has control characters: {name!r}")
    return names


class SafetensorsFolder:
    """Reads the tensors of a folder one at a time."""

    def __init__(self, folder: Path) -> None:
        """Read only the index and the headers.

        Raises:
            UserError: the folder contains no safetensors.
            DamagedError: a file is missing or damaged; the message names it.
        """
        self._folder = folder
        self.tensors: dict[str, Header] = {}
        for name in shard_names(folder):
            with self._open(name, "numpy") as file:  # "pt" imports torch, which no header needs
                for key in file.keys():  # noqa: SIM118
                    view = file.get_slice(key)
                    self.tensors[key] = Header(name, tuple(view.get_shape()), view.get_dtype())

    def read(self, key: str) -> Tensor:
        """Read one tensor in its stored dtype."""
        # Reopen the file each time: pages read through an open file stay in memory.
        with self._open(self.tensors[key].file) as file:
            return file.get_tensor(key)

    @contextmanager
    def _open(self, name: str, framework: str = "pt") -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        if (path := self._folder / name).exists() and not path.is_file():  # reading a pipe would wait for its writer
            raise DamagedError(f"{name} cannot be read (Not a regular file)")
        try:
            with safe_open(self._folder / name, framework=framework) as file:
                yield file
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror or error})") from None
        except SafetensorError as error:
            raise DamagedError(f"{name} is damaged ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        DamagedError: the file cannot be read, or does not contain an object.
    """
    try:
        content = load_json(path)
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DamagedError(f"{path.name} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path.name} is damaged (it contains a {type(content).__name__} instead of an object)")
    return content


@dataclass(frozen=True)
class Piece:
    """Tensors that are read together and written to the same shard."""

    nbytes: int
    """Total size of the tensors in bytes."""

    read: Callable[[], dict[str, Tensor]]
    """Reads the tensors; they must be contiguous and must not share memory."""


def write_shards(pieces: Sequence[Piece], folder: Path) -> dict[str, FileRecord]:
    """Stream pieces into shards in order, write their index, and return the records of the shards.

    Raises:
        StorageError: writing failed.
    """
    from megatron_mosa.utils import progress

    shards = list(_plan(pieces))
    weight_map: dict[str, str] = {}
    records: dict[str, FileRecord] = {}
    total = sum(piece.nbytes for piece in pieces)
    # Write each shard while reading the next: two shards are in memory, and reading overlaps with writing.
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
            weight_map |= dict.fromkeys(tensors, name)
            bar.update(sum(tensor.nbytes for tensor in tensors.values()))
        written.result()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return records


def _write_shard(tensors: dict[str, Tensor], file: Path, records: dict[str, FileRecord]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(f"could not write {file.name} ({error})") from None
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors makes files readable by the owner only
    records[file.name] = sync_and_evict(file)


def _plan(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Group pieces in order into shards of at most ``_SHARD_BYTES``; a larger piece gets its own shard."""
    shard: list[Piece] = []
    size = 0
    for piece in pieces:
        if shard and size + piece.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(piece)
        size += piece.nbytes
    yield shard
