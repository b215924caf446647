"""Errors that a user sees as one line, without a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """A user's mistake: one line that names the key, the value, what is allowed and the fix.

    Entry points print it as ``error: ...`` and exit with code 2. Any exception that is neither this nor a RunError is a
    bug and keeps its traceback.
    """

    of_all_ranks = False
    """Every rank of the run raises it, and so none of them has to be named, nor ended because another one has."""


class RunError(Exception):
    """A run that cannot continue, though the user made no mistake: one line, exit code 1."""

    of_all_ranks = False
    """Every rank of the run raises it; see ``UserError``."""


class UnrecoverableError(RunError):
    """A run that a restart would not help: exit code 3 of pretrain_mosa.py."""

    of_all_ranks = True


class StorageError(RunError):
    """A failed write to the file system, or read of a checkpoint, on any rank."""

    of_all_ranks = True


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word closest to ``word``, or an empty string.

    Args:
        prefix: what the suggestion begins with, besides the known word.
    """
    matches = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{prefix}{matches[0]}'?)" if matches else ""


def nearest_path(path: str | Path) -> str:
    """Return the hint of ``nearest`` for a missing file or folder: what has a similar name in the same folder.

    The folder is written as in ``path``, so that the suggestion can be pasted.
    """
    folder, name = os.path.split(str(path).rstrip("/"))
    try:
        siblings = os.listdir(os.path.expanduser(folder) or ".")
    except OSError:  # a hint is not worth another error
        return ""
    return nearest(name, siblings, os.path.join(folder, ""))
