"""The manifest of a checkpoint: the size and the hash of every file, so that damage is found before it is loaded."""

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
from megatron_mosa.utils.files import sync

MANIFEST = "manifest.json"
ALGORITHM = "xxh3_128"
_THREADS = 8  # hashing lets other threads run
_BLOCK = 1 << 22


class DamagedError(UserError):
    """A checkpoint that is not what was written; says which file."""


@contextmanager
def naming_damage(folder: Path) -> Iterator[None]:
    """Say of damage that is found inside, where it is; it is a conversion's failure, not its user's mistake.

    Raises:
        RunError: for every ``DamagedError``.
    """
    try:
        yield
    except DamagedError as error:
        raise RunError(f"'{folder}' is damaged: {error}; restore it, or give another one") from None


@dataclass(frozen=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    hash: str


def digests(folder: Path, files: list[str]) -> dict[str, FileRecord]:
    """Records of some files below ``folder``, read once."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(files, pool.map(lambda name: _digest(folder / name), files), strict=True))


def files_below(folder: Path) -> list[str]:
    """All files but the manifest, by their paths from ``folder``, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def write_manifest(folder: Path, records: dict[str, FileRecord]) -> None:
    """Write the manifest, and see all files and the folders' entries onto the disk."""
    content = {"algorithm": ALGORITHM, "files": {name: asdict(record) for name, record in sorted(records.items())}}
    path = folder / MANIFEST
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for entry in (*folder.rglob("*"), folder):
        sync(entry)


def is_recorded(folder: Path, files: Collection[str]) -> bool:
    """Whether there is a manifest, and it is about these files: who saves a model anew may leave an old one behind."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].keys()
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # find_damage says what is wrong with it
    return not recorded.isdisjoint(files)


def find_damage(folder: Path, *, reads_all: bool) -> str | None:
    """What is wrong with a checkpoint, by its manifest: the first file that is missing or another one; None if nothing.

    Args:
        reads_all: compare hashes, too; otherwise sizes alone, which reads next to nothing.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
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
            return f"{name} has {size} bytes, written were {record.bytes}"
    if reads_all:
        if content.get("algorithm") != ALGORITHM:
            return f"{MANIFEST} has hashes of another kind, {content.get('algorithm')}; expected {ALGORITHM}"
        for name, found in digests(folder, list(records)).items():
            if found != records[name]:
                return f"{name} is not what was written: its hash is {found.hash}, written was {records[name].hash}"
    return None


def settle(path: Path) -> FileRecord:
    """See a file that was just written onto the disk and out of the page cache; return its record.

    A conversion writes gigabytes that it does not read again. Cached, they would push out what others use, and new
    memory for each page can cost the kernel more than the write.
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
