"""The one kind of error that a user sees without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake of the user's: one readable line naming key, value, what is legal and the fix.

    Entry points print it as ``error: ...`` and exit with code 2. Anything else that escapes is a bug of
    ours and keeps its traceback.
    """


class RunError(Exception):
    """A run that cannot go on through no mistake in how it was asked for: one readable line, exit code 1."""


class GaveUpError(RunError):
    """A run that another start would not help: exit code 3 of pretrain_mosa.py."""


class StorageError(RunError):
    """A file system that did not take what was to be written, on any rank."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word closest to ``word``, or an empty string."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
