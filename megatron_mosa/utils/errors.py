"""Texts of other programs' errors."""

from __future__ import annotations

import errno
import os

_REMEDIES = {
    errno.ENOSPC: "free some space and start again",
    errno.EDQUOT: "free some space, or have the quota raised, and start again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and start again",
    errno.EROFS: "make the file system writable, or use another directory",
}


def file_problem(error: OSError, name: str = "", *, has_remedy: bool = True) -> str:
    """Return one line on a file that cannot be used: which, why and, for a disk that takes no more, what to do.

    Args:
        name: what could not be written if the error names no file.
        has_remedy: False leaves out what to do.
    """
    where = name if error.filename is None else f"'{os.fsdecode(error.filename)}'"
    verb = "write" if error.errno in _REMEDIES or error.filename is None else "use"
    remedy = f"; {_REMEDIES[error.errno]}" if has_remedy and error.errno in _REMEDIES else ""
    return f"{' '.join(['could not', verb, where]).strip()}: {error.strerror or first_line(error)}{remedy}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
