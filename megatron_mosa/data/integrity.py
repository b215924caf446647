"""Whether the files of a dataset are those that were built: their hashes against the manifest's."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_mosa.data import hashing
from megatron_mosa.data.hashing import REBUILD, damage, file_sha256
from megatron_mosa.data.manifest import SPLITS, DamagedDatasetError, Manifest
from megatron_mosa.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")  # magic, version, data type, sequences, documents; then their lengths and offsets

FOREGROUND_BYTES = 1 << 30
"""So much is hashed before a run begins: seconds. What is larger is hashed beside it."""


class FileHash(NamedTuple):
    """A file, and what its SHA-256 should be."""

    path: Path
    sha256: str


def recorded_hashes(folder: Path, manifest: Manifest) -> list[FileHash]:
    """The token files of a dataset. Older manifests do not record the hashes of .idx files, which are left out then."""
    return [
        FileHash(folder / f"{split}.{suffix}", manifest.splits[split][f"{suffix}_sha256"])
        for split in SPLITS
        for suffix in ("bin", "idx")
        if f"{suffix}_sha256" in manifest.splits[split]
    ]


def total_bytes(files: Iterable[FileHash]) -> int:
    """Their size."""
    return sum(file.path.stat().st_size for file in files)


def find_damage(files: Sequence[FileHash], fix: str = REBUILD) -> str | None:
    """One line about the first file that is not what was recorded; None: all are. Several are read at once.

    Args:
        fix: what to do about it.

    Raises:
        UserError: a file that cannot be read.
    """

    def look(file: FileHash) -> str | None:
        try:
            found = file_sha256(file.path)
        except OSError as error:
            raise UserError(f"{file.path} cannot be read: {error.strerror}") from error
        return None if found == file.sha256 else damage(file.path, file.sha256, found, fix)

    with ThreadPoolExecutor(4) as pool:  # hashing runs without Python's lock
        return next(filter(None, pool.map(look, files)), None)


def is_large(files: Iterable[FileHash]) -> bool:
    """Whether hashing them would delay a start for long."""
    return total_bytes(files) > FOREGROUND_BYTES


def refuse_damage(files: Sequence[FileHash], fix: str = REBUILD) -> None:
    """Compare the files, unless they are too large for that.

    Raises:
        DamagedDatasetError: naming one that is damaged.
    """
    if not is_large(files) and (found := find_damage(files, fix)) is not None:
        raise DamagedDatasetError(found)


def open_indexed(prefix: Path) -> IndexedDataset:
    """The token arrays at ``prefix``.bin and .idx.

    Raises:
        DamagedDatasetError: an .idx file that is damaged.
    """
    try:
        _check_head(Path(f"{prefix}.idx"))  # mcore prints a second error where it cannot read the head
        return IndexedDataset(str(prefix))
    except (AssertionError, ValueError, IndexError) as error:
        reason = str(error).split("\n")[0] or "its counts contradict each other"
        raise DamagedDatasetError(f"{prefix}.idx is damaged: {reason}; {REBUILD}") from error


def _check_head(file: Path) -> None:
    """Raise a ValueError if the beginning of an .idx file, or its size, is not that of one."""
    with file.open("rb") as content:
        head = content.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise ValueError("it ends within its head")
    magic, version, code, sequences, documents = _HEAD.unpack(head)
    if magic != _MAGIC or version != 1:
        raise ValueError("it does not begin as an index of version 1")
    DType.dtype_from_code(code)  # a ValueError of its own
    size = _HEAD.size + 12 * sequences + 8 * documents
    if size != file.stat().st_size:
        raise ValueError(f"its counts make it {size} bytes, and it has {file.stat().st_size}")


class HashingProcess:
    """Compares large files in a process of its own, of the lowest priority, beside a run; see ``hashing``."""

    def __init__(self, files: Sequence[FileHash]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-IS", hashing.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as content:
            json.dump([(str(path.resolve()), expected) for path, expected in files], content)

    @property
    def is_over(self) -> bool:
        """Whether all files were read, or one was found damaged."""
        return self._process.poll() is not None

    def damage(self) -> str | None:
        """What is damaged, once it is over; None: nothing."""
        if not self._process.returncode:
            return None
        assert self._process.stdout is not None
        return self._process.stdout.read().strip() or "a file of the dataset could not be checked"

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
