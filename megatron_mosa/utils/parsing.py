"""JSON from files that may be damaged, of numbers that may be NaN, and texts that may be odd."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any


def is_plain(text: str) -> bool:
    """Return whether a text is UTF-8 without control characters, so that files and terminals take it as it is."""
    return all(sign >= " " and not "\x7f" <= sign < "\xa0" and not "\ud800" <= sign <= "\udfff" for sign in text)


def finite(value: Any) -> Any:
    """Return a value of lists, tuples and mappings with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read, for which Python raises a RecursionError.
    """
    try:
        return json.loads(text, parse_int=json_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_integer(digits: str) -> int | float:
    """Return an integer, or infinity for one of more than 4,300 digits, which Python refuses to read."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def load_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: it cannot be read, or is not a regular file: reading a pipe or a device may never end.
        ValueError: as ``parse_json``, or it is not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return parse_json(path.read_text(encoding="utf-8"))
