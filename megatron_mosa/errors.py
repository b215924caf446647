"""Errors that a user sees as one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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
    """A failed write to the file system, on any rank."""

    of_all_ranks = True


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word closest to ``word``, or an empty string."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
