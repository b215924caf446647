"""Garbage collection in entry points."""

from __future__ import annotations

import gc

import pytest

from megatron_mosa.entry import gc_disabled_during_imports, run


def test_the_collector_ignores_imported_objects_and_then_resumes() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), gc_disabled_during_imports():
            assert gc.get_threshold()[0] == 0  # off
            module = {"a": []}
            raise ImportError
        assert gc.get_threshold() == before
        assert gc.get_freeze_count() > frozen
        assert not any(thing is module for thing in gc.get_objects())
        assert any(thing is now for now in [{"b": []}] for thing in gc.get_objects())
    finally:
        gc.unfreeze()


def test_a_program_exits_without_a_final_collection() -> None:
    made = []
    try:
        assert run(lambda: made.append({"a": []})) == 0
        assert not any(thing is made[0] for thing in gc.get_objects())
    finally:
        gc.unfreeze()
