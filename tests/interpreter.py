"""Triton's interpreter without what it does again and again: the tests of kernels take half the time.

What is replaced is private to Triton. So it is done for the releases alone that it was read and tried for; with any
other the tests prove the same and take longer.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

FITS = ("3.7.1",)
"""Releases of Triton. To add one: read ``InterpretedFunction.__call__``, ``_patch_lang`` and ``_get_np_dtype`` in
triton/runtime/interpreter.py, then run tests/kernels/test_interpreter.py."""


def fits() -> bool:
    """Whether that is the Triton which is installed."""
    try:
        return importlib.metadata.version("triton") in FITS
    except importlib.metadata.PackageNotFoundError:
        return False


def speed_up() -> None:
    """Once for a process, before kernels are interpreted in it."""
    if not fits():
        return
    from triton.runtime import interpreter

    # At each call of a function inside a kernel it searches triton.language for what is to be interpreted, which it
    # found at the first such call of that function's module, and leaves in place.
    searched: set[str] = set()

    def call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in searched:
            interpreter._patch_lang(self.fn)
            searched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call  # type: ignore[method-assign]

    # For the type of every new array it makes a table of all types.
    known: dict[str, Any] = {}
    look_up = interpreter._get_np_dtype

    def remembered(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = look_up(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = remembered
