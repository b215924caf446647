"""Dataclasses from JSON that may be damaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_mosa.utils import known_values, read_record


@dataclass(frozen=True)
class Found:
    name: str
    seconds: float
    steps: int | None
    times: Mapping[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    causal: bool = True


WHOLE: dict[str, Any] = {"name": "a", "seconds": 1, "steps": None, "times": {"1": 2.0}, "losses": [1, 2.5]}


def test_a_record_has_what_is_known_of_it() -> None:
    assert read_record(Found, WHOLE | {"of_a_later_version": 3}) == Found("a", 1, None, {"1": 2.0}, [1, 2.5])
    assert known_values(Found, {"steps": 3, "unknown": "x"}) == {"steps": 3}


@pytest.mark.parametrize(
    "damage",
    [
        {"name": None}, {"seconds": "1"}, {"seconds": True}, {"seconds": float("nan")}, {"seconds": float("inf")},
        {"steps": 1.5}, {"steps": False}, {"times": []}, {"times": {"1": "2"}}, {"losses": 3}, {"losses": [None]},
        {"causal": 1},
    ],
)  # fmt: skip
def test_values_of_other_types_are_named(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(damage))} has a value of another type"):
        read_record(Found, WHOLE | damage)


@pytest.mark.parametrize("content", [[], None, "a", 3])
def test_what_is_no_object_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="not a JSON object"):
        read_record(Found, content)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ValueError, match="it has no steps"):
        read_record(Found, {"name": "a", "seconds": 1.0})


def test_an_unknown_key_is_damage_where_all_are_known() -> None:
    with pytest.raises(ValueError, match="unknown key 'nome'"):
        read_record(Found, WHOLE | {"nome": "a"}, knows_all=True)
