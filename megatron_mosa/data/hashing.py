"""``python hashing.py``: compare files with their hashes beside a run. It needs nothing but the standard library.

Standard input: a JSON list of [path, SHA-256]. It ends with exit code 0 if all are equal; else it prints one line about
the first that is not, and ends with 1. It ends, too, when whoever started it does.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

CHUNK = 1 << 23  # bytes


def file_sha256(file: Path, *, keep_cached: bool = True, parent: int | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Args:
        keep_cached: False: what was read is not kept in memory, where others may want the room.
        parent: end this process when its parent is another than this one.
    """
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as content:
        buffer = bytearray(CHUNK)
        view, place = memoryview(buffer), 0
        while size := content.readinto(buffer):
            digest.update(view[:size])
            if parent is not None and os.getppid() != parent:
                sys.exit(1)
            if not keep_cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(content.fileno(), place, size, os.POSIX_FADV_DONTNEED)
            place += size
    return digest.hexdigest()


REBUILD = "restore it from a copy, or rebuild the dataset: mosa data build CONFIG --force"


def damage(file: Path, expected: str, found: str, fix: str = REBUILD) -> str:
    """One line about a file with another hash than the recorded one."""
    return f"{file} is damaged: its SHA-256 is {found[:16]}..., and {expected[:16]}... is recorded; {fix}"


def main() -> int:
    """Compare; return the exit code."""
    parent = os.getppid()
    os.nice(19)
    for name, expected in json.load(sys.stdin):
        try:
            found = file_sha256(Path(name), keep_cached=False, parent=parent)
        except OSError as error:
            print(f"{name} cannot be read: {error.strerror}")
            return 1
        if found != expected:
            print(damage(Path(name), expected, found))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
