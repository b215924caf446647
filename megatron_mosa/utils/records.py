"""Dataclasses from JSON that may be damaged, or that another version has written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
_LARGEST = 1e300  # of a number, with which one can still compute
_TOO_LARGE = 2**63  # for an integer that is counted, in numpy or in a picture


def read_record(kind: type[Record], content: Any, *, knows_all: bool = False) -> Record:
    """Return the dataclass ``kind`` with the values of a JSON object.

    Args:
        knows_all: reject keys that are not fields of ``kind``, instead of leaving them out.

    Raises:
        ValueError: it is not an object, lacks a value, or has one of another type.
    """
    values = known_values(kind, content)
    if knows_all and len(values) < len(content):
        raise ValueError(f"unknown key {next(name for name in content if name not in values)!r}")
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"it has no {field.name}")
    return kind(**values)


def known_values(kind: type | Callable[..., Any], content: Any) -> dict[str, Any]:
    """Return those values of a JSON object that are fields of the dataclass, or arguments of the function, ``kind``.

    Types are checked as far as JSON tells them apart, below lists and mappings, too; numbers must be finite, and texts
    such that a file can hold them.

    Raises:
        ValueError: it is not an object, or a value has another type.
    """
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    hints = _hints(kind)
    values = {name: value for name, value in content.items() if name in hints}
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{name} has a value of another type")
    return values


@cache
def _hints(kind: type | Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_text(value: str) -> bool:
    """Return whether a text can be written into a file, and be part of a file's name."""
    return "\0" not in value and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if hint is NoneType:
        return value is None
    if hint is float:
        return _fits(value, int) or (isinstance(value, float) and abs(value) < _LARGEST)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _TOO_LARGE
    if hint is str:
        return isinstance(value, str) and _is_text(value)
    if hint is bool:
        return isinstance(value, bool)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(_is_text(key) and _fits(one, parts[1]) for key, one in value.items())
    if origin is tuple and parts[-1] is not Ellipsis:
        return isinstance(value, list) and len(value) == len(parts) and all(map(_fits, value, parts))
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return isinstance(value, list) and all(_fits(one, parts[0]) for one in value)
    return True  # of a class of its own, which checks itself
