"""Triton's interpreter without repeated work, which halves the time of the kernel tests.

The replaced functions are private to Triton, so only the releases in FITS are patched. With any other release the tests
prove the same but take longer.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

FITS = ("3.7.1",)
"""Supported Triton releases. To add one, read ``InterpretedFunction.__call__``, ``_patch_lang``, ``_get_np_dtype`` of
triton/runtime/interpreter.py, then run tests/kernels/test_interpreter.py."""


def fits() -> bool:
    """Whether the installed Triton is one of FITS."""
    try:
        return importlib.metadata.version("triton") in FITS
    except importlib.metadata.PackageNotFoundError:
        return False


def speed_up() -> None:
    """Patch the interpreter, once per process, before it runs a kernel."""
    if not fits():
        return
    from triton.runtime import interpreter

    # At each call of a function in a kernel Triton patches triton.language again, although the patches of the first
    # call from that function's module are still in place.
    searched: set[str] = set()

    def call(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in searched:
            interpreter._patch_lang(self.fn)
            searched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call  # type: ignore[method-assign]

    # For each new array Triton builds a table of all types to look up one.
    known: dict[str, Any] = {}
    look_up = interpreter._get_np_dtype

    def remembered(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = look_up(dtype)
        return known[dtype.name]

    interpreter._get_np_dtype = remembered
