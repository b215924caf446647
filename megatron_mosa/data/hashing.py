"""Hash files. ``python hashing.py`` compares files with their hashes beside a run; it needs only the standard library.

It reads a JSON list of [path, SHA-256] from standard input. If a file differs or cannot be read, it prints one line
about the first such file and exits with 1, otherwise with 0. It ignores the signals that end a job, and exits when its
parent process does.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

CHUNK = 1 << 23  # bytes
REBUILD = "restore it from a copy, or rebuild the dataset: mosa data build CONFIG --force"


def file_sha256(file: Path, *, keep_cached: bool = True, parent: int | None = None) -> str:
    """Return the SHA-256 of a file in hexadecimal.

    Args:
        file: the file to hash.
        keep_cached: False: drop what was read from the page cache, so that others can use the memory.
        parent: exit once the parent process is not this one any more.
    """
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as content:
        buffer = bytearray(CHUNK)
        view, position = memoryview(buffer), 0
        while size := content.readinto(buffer):
            digest.update(view[:size])
            if parent is not None and os.getppid() != parent:
                sys.exit(1)
            if not keep_cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(content.fileno(), position, size, os.POSIX_FADV_DONTNEED)
            position += size
    return digest.hexdigest()


def damage_message(file: Path, expected: str, found: str, fix: str = REBUILD) -> str:
    """Return one line about a file whose hash is not the recorded one."""
    return f"{file} is damaged: its SHA-256 is {found[:16]}... instead of the recorded {expected[:16]}...; {fix}"


def main() -> int:
    """Compare the files named on standard input; return the exit code."""
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole job; the trainer kills this process when it ends
    parent = os.getppid()
    os.nice(19)
    for name, expected in json.load(sys.stdin):
        try:
            found = file_sha256(Path(name), keep_cached=False, parent=parent)
        except OSError as error:
            print(f"could not read {name}: {error.strerror}")
            return 1
        if found != expected:
            print(damage_message(Path(name), expected, found))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
