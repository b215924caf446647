"""Verify the files of a dataset against the hashes in its manifest."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_mosa.data import hashing
from megatron_mosa.data.hashing import REBUILD, damage_message, file_sha256
from megatron_mosa.data.manifest import SPLITS, DamagedDatasetError, Manifest
from megatron_mosa.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

_MAGIC = b"MMIDIDX\x00\x00"
_DATA_TYPES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # codes of Megatron-core's DType: bytes of an element
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, data type, sequences, documents; then their lengths and offsets

FOREGROUND_BYTES = 1 << 30
"""Datasets up to this size are hashed before a run starts, which takes seconds; larger ones during the run."""


class FileHash(NamedTuple):
    """A file and its expected SHA-256."""

    path: Path
    sha256: str


def recorded_hashes(folder: Path, manifest: Manifest) -> list[FileHash]:
    """Return the hashes of a dataset's token files. Older manifests do not record those of .idx files."""
    return [
        FileHash(folder / f"{split}.{suffix}", manifest.splits[split][f"{suffix}_sha256"])
        for split in SPLITS
        for suffix in ("bin", "idx")
        if f"{suffix}_sha256" in manifest.splits[split]
    ]


def find_damage(files: Sequence[FileHash], fix: str = REBUILD) -> str | None:
    """Return one line about the first file that does not have its recorded hash; None: all have it.

    Args:
        files: files to hash, several at once.
        fix: what the line tells the user to do.

    Raises:
        UserError: a file cannot be read.
    """

    def check(file: FileHash) -> str | None:
        try:
            found = file_sha256(file.path)
        except OSError as error:
            raise UserError(f"could not read {file.path}: {error.strerror}; {fix}") from error
        return None if found == file.sha256 else damage_message(file.path, file.sha256, found, fix)

    with ThreadPoolExecutor(4) as pool:  # hashing releases Python's global lock
        return next(filter(None, pool.map(check, files)), None)


def is_large(files: Iterable[FileHash]) -> bool:
    """Return whether hashing the files would noticeably delay the start of a run."""
    return sum(file.path.stat().st_size for file in files) > FOREGROUND_BYTES


def refuse_damage(files: Sequence[FileHash]) -> None:
    """Verify the hashes of the files, unless they are too large for that.

    Raises:
        DamagedDatasetError: a file is damaged.
    """
    if not is_large(files) and (found := find_damage(files)) is not None:
        raise DamagedDatasetError(found)


def open_indexed(prefix: Path) -> IndexedDataset:
    """Open the token arrays in ``prefix``.bin and .idx.

    Raises:
        DamagedDatasetError: the .idx file is damaged.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # slow to import

    check_header(prefix)  # on a bad header mcore would print an error of its own
    with _damage_named(prefix):
        return IndexedDataset(str(prefix))


def check_header(prefix: Path) -> None:
    """Check header and size of ``prefix``.idx.

    Raises:
        DamagedDatasetError: either is wrong.
    """
    with _damage_named(prefix):
        _check_header(Path(f"{prefix}.idx"))


class Index(NamedTuple):
    """The arrays of an .idx file."""

    element_bytes: int
    """of a token in the .bin file"""

    lengths: np.ndarray
    """tokens of each document, int32"""

    offsets: np.ndarray
    """where each document begins in the .bin file, in bytes, int64"""

    documents: np.ndarray
    """the number of the first sequence of each document, and of the end, int64"""


def read_index(prefix: Path) -> Index:
    """Read ``prefix``.idx without Megatron-core, which takes seconds to import.

    Raises:
        DamagedDatasetError: its header or size is wrong.
    """
    check_header(prefix)
    content = np.fromfile(f"{prefix}.idx", dtype=np.uint8)
    _, _, dtype_code, sequences, documents = _HEADER.unpack(content[: _HEADER.size].tobytes())
    ends = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * documents])
    lengths, offsets, firsts = (content[start:end] for start, end in pairwise(ends.tolist()))
    return Index(_DATA_TYPES[dtype_code], lengths.view("<i4"), offsets.view("<i8"), firsts.view("<i8"))


@contextmanager
def _damage_named(prefix: Path) -> Iterator[None]:
    try:
        yield
    except (AssertionError, ValueError, IndexError) as error:
        reason = str(error).partition("\n")[0] or "its counts contradict each other"
        raise DamagedDatasetError(f"{prefix}.idx is damaged: {reason}; {REBUILD}") from error


def _check_header(file: Path) -> None:
    with file.open("rb") as content:
        header = content.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ValueError("its header is incomplete")
    magic, version, dtype_code, sequences, documents = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1:
        raise ValueError("it does not start with the header of an index of version 1")
    if dtype_code not in _DATA_TYPES:
        raise ValueError(f"its header names data type {dtype_code}, which does not exist")
    size = _HEADER.size + 12 * sequences + 8 * documents
    if size != file.stat().st_size:
        raise ValueError(f"its header implies {size} bytes, but it has {file.stat().st_size}")


class HashingProcess:
    """A process of the lowest priority that hashes large files while a run uses them; see ``hashing``."""

    def __init__(self, files: Sequence[FileHash]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-IS", hashing.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as content:
            json.dump([(str(path.resolve()), expected) for path, expected in files], content)

    @property
    def is_over(self) -> bool:
        """Whether all files were hashed, or one was found damaged."""
        return self._process.poll() is not None

    def damage(self) -> str | None:
        """Return one line about the first damaged file; None: none was found. Valid once the process is over."""
        assert self._process.stdout is not None
        return self._process.stdout.read().strip() or None

    @property
    def exit_code(self) -> int | None:
        """0: all files are intact. Without damage, any other one means that not all were hashed."""
        return self._process.returncode

    def close(self) -> None:
        """Kill the process if it still runs."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
