"""Texts of other programs' errors."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
