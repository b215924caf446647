"""Metadata of a configuration key besides its type: its meaning, default and allowed values."""

from __future__ import annotations

import math
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from megatron_mosa.errors import nearest


@dataclass(frozen=True)
class Key:
    """The meaning of one key and its allowed values, kept as metadata of its dataclass field.

    Attributes:
        comment: meaning and unit, as ``configs/reference.yaml`` prints it.
        choices: the only values, if not empty. None is allowed where the field's type allows it.
        at_least, above, below, at_most: bounds of a number.
        reason: why a bound is what it is, for the error message.
        counts: the kind of attention heads that the number counts, as it is written in a sentence; empty: none.
    """

    comment: str
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    reason: str = ""
    counts: str = ""

    def bounds(self) -> str:
        """Return the bounds in words, such as "greater than 0 and at most 1", or "" if there are none."""
        words = {
            "at least": self.at_least,
            "greater than": self.above,
            "less than": self.below,
            "at most": self.at_most,
        }
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)

    def interval(self) -> str:
        """Return the bounds as an interval such as "(0, 1]", as ">= 1" if there is only one, or "" without any."""
        low, high = (self.above, ">") if self.at_least is None else (self.at_least, ">="), (self.below, self.at_most)
        if low[0] is None:
            return (
                f"< {self.below}"
                if self.below is not None
                else f"<= {self.at_most}"
                if self.at_most is not None
                else ""
            )
        if high == (None, None):
            return f"{low[1]} {low[0]}"
        return f"{'(' if low[1] == '>' else '['}{low[0]}, " + (f"{high[1]}]" if high[0] is None else f"{high[0]})")

    def allows(self, value: Any) -> bool:
        """Return whether a value of the right type, or each in a list, is a choice or a finite number in the bounds."""
        if isinstance(value, list):
            return all(map(self.allows, value))
        if self.choices:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return (
            -math.inf < value < math.inf  # torch.compile cannot trace math.isfinite on symbolic numbers
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    def error_message(self, name: str, value: Any) -> str | None:
        """Return the error for a value that is not allowed: "train.steps must be at least 1, got 0"; else None."""
        if self.allows(value):
            return None
        if self.choices:
            words = ["null" if choice is None else str(choice) for choice in self.choices]
            hint = nearest(value, words) if isinstance(value, str) else ""
            return f"{name} must be one of {', '.join(words)}, got {value}{hint}"
        if value == math.inf or not self.bounds():
            return f"{name} must be a finite number, got {value}"
        return f"{name} must be {self.bounds()}, got {value}" + (f": {self.reason}" if self.reason else "")


def key(default: Any, comment: str, **allowed: Any) -> Any:
    """Return a dataclass field with a default and a ``Key``; a list is copied for each instance."""
    metadata = {"key": Key(comment, **allowed)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(comment: str, **allowed: Any) -> Any:
    """Return a dataclass field that a configuration file must set."""
    return key(MISSING, comment, **allowed)


def keys_of(section: type[Any]) -> dict[str, Key]:
    """Return the ``Key`` of each field in a section of the schema."""
    return {item.name: item.metadata["key"] for item in fields(section)}


def default_of(item: Field[Any]) -> Any:
    """Return the default of a dataclass field, or omegaconf's ``MISSING`` ("???") if it is required."""
    return item.default if item.default_factory is NO_DEFAULT else item.default_factory()
