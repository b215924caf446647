"""Tiles so small that a few tokens make several of each kind, and a remainder: a program costs the interpreter about as
much time with four tokens as with a hundred, so what counts is how many there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

SMALL = {
    "scores": dict(TOKENS=8, HEADS=4, COLUMNS=8),
    "selection": dict(BLOCK=16),
    "select_above": dict(BLOCK=16),
    "follow": dict(BLOCK=16),
    "count_scores": dict(BLOCK=16),
    "gathered": dict(ROWS=8, INNER=8),
    "scattered": dict(ROWS=8, COLUMNS=8, INNER=8, PROGRAMS=3),
    "combine": dict(UNROLL=8, COLUMNS=8),
    "weight_gradient": dict(ROWS=8, COLUMNS=8),
    "attention": dict(BLOCK=4),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_mosa.kernels.triton import rows, scattered, tiles  # only now: triton is optional

    def smaller(choose: Callable[..., dict], sizes: dict[str, int]) -> Callable[..., dict]:
        return lambda *arguments: choose(*arguments) | sizes

    for name, sizes in SMALL.items():
        monkeypatch.setattr(tiles, name, smaller(getattr(tiles, name), sizes))
    monkeypatch.setattr(tiles, "group", lambda *_: 2)  # of the tiles of a head, which may be three: two, and then one
    monkeypatch.setattr(scattered, "FEWEST_CHUNKS", 1)
    monkeypatch.setattr(rows, "LISTED_HEADS", 2)
    for name, size in dict(SEQUENCES=2, SLOTS=4, TOKENS=8, ROWS=8).items():
        monkeypatch.setattr(rows, name, size)
