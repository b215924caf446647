"""What every entry point does alike: a user's mistake is one line and exit code 2; known noise is kept quiet."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

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


def exit_code_of(error: Exception) -> int:
    """Of a program that such an error ended."""
    return WRONG_USE if isinstance(error, UserError) else GAVE_UP if isinstance(error, GaveUpError) else FAILED


def run(program: Callable[[], object]) -> int:
    """Run a program; return its exit code (``exit_codes``), which is what it returns if that is a number.

    Our own bugs keep their traceback.
    """
    # Megatron-core warns at import of every optional package that is absent; the README says what that means.
    warnings.filterwarnings("ignore", module=r"(megatron\.core|deepspeed|torch)\b.*")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    try:
        code = program()
    except (UserError, RunError) as error:
        if local_rank == 0:  # once a node
            print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    return code if isinstance(code, int) else DONE
