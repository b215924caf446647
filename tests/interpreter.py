"""Triton's interpreter without what it does again and again: the tests of kernels take two thirds of the time."""

from __future__ import annotations

import contextlib
from typing import Any


def speed_up() -> None:
    """At each call of a function inside a kernel it searches triton.language for what is to be interpreted, which it
    found at the first such call of that function's module, and leaves in place. Nothing where Triton is not."""
    with contextlib.suppress(ImportError):
        from triton.runtime import interpreter

        searched: set[str] = set()

        def call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
            if self.fn.__module__ not in searched:
                interpreter._patch_lang(self.fn)
                searched.add(self.fn.__module__)
            return self.rewrite()(*args, **kwargs)

        interpreter.InterpretedFunction.__call__ = call  # type: ignore[method-assign]
