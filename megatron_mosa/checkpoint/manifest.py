"""Record and verify the size and hash of every file of a checkpoint, so that damage is found before loading."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from megatron_mosa.errors import RunError, UserError
from megatron_mosa.utils import load_json, sync

MANIFEST = "manifest.json"
ALGORITHM = "xxh3_128"
_THREADS = 8  # hashing releases the GIL
_BLOCK = 1 << 22


class DamagedError(UserError):
    """A checkpoint that differs from what was written; the message names the file."""


@contextmanager
def damage_as_run_error(folder: Path) -> Iterator[None]:
    """Turn a ``DamagedError`` into a RunError that names the folder: damage is not the user's mistake.

    Raises:
        RunError: for every ``DamagedError``.
    """
    try:
        yield
    except DamagedError as error:
        raise RunError(f"'{folder}' is damaged: {error}; restore it, or choose another one") from None


@dataclass(frozen=True)
class FileRecord:
    """The recorded size and hash of a file."""

    bytes: int
    hash: str


def hash_files(folder: Path, files: list[str]) -> dict[str, FileRecord]:
    """Compute the records of some files, given by their paths relative to ``folder``; reads each file once."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(lambda name: _digest(folder / name), files), strict=True))


def files_below(folder: Path) -> list[str]:
    """Return the sorted paths of all files except the manifest, relative to ``folder``."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def write_manifest(folder: Path, records: dict[str, FileRecord]) -> None:
    """Write the manifest, and sync all files and folders to disk."""
    content = {"algorithm": ALGORITHM, "files": {name: asdict(record) for name, record in sorted(records.items())}}
    path = folder / MANIFEST
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for entry in (*folder.rglob("*"), folder):
        sync(entry)


def is_recorded(folder: Path, files: Collection[str]) -> bool:
    """Whether there is a manifest that covers any of these files: saving a model again may leave an old one behind."""
    try:
        recorded = load_json(folder / MANIFEST)["files"].keys()
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # find_damage reports what is wrong with the manifest
    return not recorded.isdisjoint(files)


def find_damage(folder: Path, *, reads_all: bool) -> str | None:
    """Compare a checkpoint with its manifest; describe the first missing or altered file, or return None.

    Args:
        reads_all: compare hashes, too; otherwise only sizes, which reads almost nothing.
    """
    try:
        content = load_json(folder / MANIFEST)
        records = {name: FileRecord(**record) for name, record in content["files"].items()}
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    for name, record in records.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if size != record.bytes:
            return f"{name} has {size} bytes instead of {record.bytes}"
    if reads_all:
        if content.get("algorithm") != ALGORITHM:
            return f"{MANIFEST} uses the unsupported hash algorithm {content.get('algorithm')} (supported: {ALGORITHM})"
        for name, found in hash_files(folder, list(records)).items():
            if found != records[name]:
                return f"{name} is corrupt: its hash is {found.hash} instead of {records[name].hash}"
    return None


def sync_and_evict(path: Path) -> FileRecord:
    """Sync a newly written file to disk, drop it from the page cache, and return its record.

    A conversion writes gigabytes that it does not read again. In the page cache they would evict other programs' pages,
    and allocating a page for them can cost the kernel more than the write itself.
    """
    record = _digest(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return record


def _digest(path: Path) -> FileRecord:
    hasher, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
            size += len(block)
    return FileRecord(size, hasher.hexdigest())
