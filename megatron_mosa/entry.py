"""What every entry point does alike: a user's mistake is one line and exit code 2; known noise is kept quiet."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from megatron_mosa.errors import GaveUpError, RunError, UserError
from megatron_mosa.exit_codes import DONE, FAILED, GAVE_UP, WRONG_USE


def keep_freed_memory() -> None:
    """Have glibc keep the memory of large tensors that are freed, for the next; elsewhere nothing changes.

    By default it goes back to the kernel, and what reads a model one tensor at a time takes every page anew, which can
    cost more than the reading.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large ones come from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: which never shrinks
        mallopt(-8, 1)  # M_ARENA_MAX: and is one for all threads


def collect_garbage_seldom() -> None:
    """For a command that ends soon: Python's collector looks at 50,000 new objects at a time, not at 700.

    torch, Megatron-core and DeepSpeed make half a million objects that stay. By default the collector goes through them
    again and again while they are loaded, which is a fifth of that time.
    """
    gc.set_threshold(50_000, 20, 20)


@contextmanager
def while_loading() -> Iterator[None]:
    """Around the imports of a training process: no garbage is looked for in here, and never in what is loaded.

    Afterwards the collector goes on as before, so that cycles do not hold tensors of past steps for long.
    """
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(*before)


def exit_code_of(error: Exception) -> int:
    """Of a program that such an error ended."""
    return WRONG_USE if isinstance(error, UserError) else GAVE_UP if isinstance(error, GaveUpError) else FAILED


def run(program: Callable[[], object]) -> int:
    """Run a program; return its exit code (``exit_codes``), which is what it returns if that is a number.

    Our own bugs keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a locale that lacks a character of a text ends no command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Megatron-core warns at import of every optional package that is absent; the README says what that means.
    warnings.filterwarnings("ignore", module=r"(megatron\.core|deepspeed|torch)\b.*")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    try:
        code = program()
    except (UserError, RunError) as error:
        if local_rank == 0:  # once a node
            print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    finally:
        gc.freeze()  # the last collection, at the end of the process, would go through all modules for a second
    return code if isinstance(code, int) else DONE
