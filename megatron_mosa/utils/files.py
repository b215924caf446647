"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_mosa.utils.errors import file_problem
from megatron_mosa.utils.parsing import is_plain

_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes, on Linux; some room is left for what will be below the path


REPLACED = ".replaced-"
"""Prefix of what ``replace_directory`` is about to remove; a process that dies meanwhile leaves it."""

_warned = set[str]()
"""Subjects of ``tolerating`` that it has warned of."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name ``path`` in an OSError that names no file, as that of writing to a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def tolerating(what: str) -> Iterator[None]:
    """Go on after an OSError, for files and output that a run can do without; warn on stderr the first time.

    Args:
        what: the files, and what is missing without them.
    """
    try:
        yield
    except OSError as error:
        if what not in _warned:
            _warned.add(what)
            with suppress(OSError):
                print(f"warning: {what}: {file_problem(error, has_remedy=False)}", file=sys.stderr)


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file beside ``path``, text as UTF-8, and rename it: readers see the old content or the new.

    A device, such as /dev/null, is written to instead of replaced.

    Args:
        durable: see the content onto the disk first, so that power loss leaves the old content or the new, too.

    Raises:
        OSError: the file could not be written; it names ``path``, and what stood there is unchanged.
    """
    content = content.encode() if isinstance(content, str) else content
    is_device = path.is_char_device() or path.is_block_device()  # writing to a pipe would wait for its reader
    temporary = path if is_device else path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            temporary.write_bytes(content)
            if is_device:
                return
            if durable:
                sync(temporary)
            os.replace(temporary, path)
    except OSError as error:
        if not is_device:
            error.filename = str(path)  # instead of the temporary file
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
    old = target.with_name(REPLACED + target.name)
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
    if not is_plain(str(path)):
        return "its name must be UTF-8 text without control characters"
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
