"""What tests/interpreter.py replaces is for the Triton that is pinned, and changes no result."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import FITS, fits, speed_up

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


@triton.jit
def _twice(numbers):
    return numbers + numbers


@triton.jit
def _kernel(source, target, N, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < N
    numbers = _twice(tl.load(source + place, mask=there, other=0.0))
    tl.store(target + place, tl.cumsum(numbers).to(target.dtype.element_ty), mask=there)


def test_the_release_is_one_that_it_fits() -> None:
    pinned = re.search(r"^triton==(.*)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pinned and pinned[1] in FITS, "kernels are interpreted in twice the time: see tests/interpreter.py"
    assert fits() == (triton.__version__ in FITS)


def test_another_release_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = interpreter.InterpretedFunction.__call__, interpreter._get_np_dtype
    for version in ("3.7.2", "3.8.0", "3.7.1.post1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        speed_up()
        assert (interpreter.InterpretedFunction.__call__, interpreter._get_np_dtype) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where there is a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_results_are_those_of_the_interpreter_as_it_is(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    searches, search = [], interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: searches.append(fn.__name__) or search(fn))
    source = torch.randn(21, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run() -> tuple[torch.Tensor, int]:
        searches.clear()
        target = torch.zeros_like(source)
        _kernel[(2,)](source, target, 21, BLOCK=16)  # pyright: ignore[reportArgumentType]
        return target, len(searches)

    sooner, few = run()
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", _as_triton_has_it)
        later, many = run()
    assert torch.equal(sooner, later) and sooner.norm() > 0
    assert (few < many) == fits()


def _as_triton_has_it(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
    interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)
