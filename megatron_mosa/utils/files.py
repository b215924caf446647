"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes, on Linux; some room is left for what will be below the path


def write_atomically(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 text file beside ``path`` and rename it: readers see the old content or the new.

    Args:
        durable: see the content onto the disk first, so that power loss leaves the old content or the new, too.

    Raises:
        OSError: the file could not be written; what stood there is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> int:
    """See a file's content, or a directory's entries, onto the disk; return the size in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def replace_directory(new: Path, target: Path) -> None:
    """Rename a finished directory to ``target``; what stood there is removed once the new one is in place.

    Raises:
        OSError: a rename failed; what stood at ``target`` is there again.
    """
    old = target.with_name(f".replaced-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
        sync(target.parent)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)
    shutil.rmtree(old, ignore_errors=True)


def creation_problem(path: Path) -> str | None:
    """Return why ``path`` cannot be created, or None; missing parents are created with it.

    It tries with a temporary file, because permissions alone say little: /proc, for one, looks writable to root.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not os.path.isdir(existing):
        return f"'{existing}' is not a directory"
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in path.parts):
        return f"a name in it is longer than {_LONGEST_NAME} bytes"
    if len(os.fsencode(path.absolute())) > _LONGEST_PATH:
        return f"it is longer than {_LONGEST_PATH} bytes"
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        is_forbidden = error.errno in (errno.EACCES, errno.EPERM)
        return f"'{existing}' is not writable" if is_forbidden else f"no file can be created in '{existing}'"
    return None


def free_megabytes(path: Path) -> int:
    """Return the free space, in MiB, where ``path`` is or would be created."""
    existing = next(folder for folder in (path, *Path(os.path.realpath(path)).parents) if folder.exists())
    return shutil.disk_usage(existing).free >> 20
