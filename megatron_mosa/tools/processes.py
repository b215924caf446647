"""Processes that a tool starts, and the directory that it writes alone."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from megatron_mosa.errors import UserError


@contextmanager
def sigterm_as_interrupt() -> Iterator[Callable[[], None]]:
    """Treat SIGTERM as Ctrl-C, so that started processes are ended and results are written.

    Yields:
        A function that raises KeyboardInterrupt if SIGTERM has come. A loop that starts processes must call it, because
        Python ignores what a signal's handler raises while it forks.
    """
    has_come = False

    def interrupt(number: int, frame: object) -> NoReturn:
        nonlocal has_come
        has_come = True
        raise KeyboardInterrupt

    def check() -> None:
        if has_come:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def alone_in(folder: Path, command: str) -> Iterator[None]:
    """Create a directory and refuse a second call of a command in it, as far as its file system has locks.

    Raises:
        UserError: another one is running there.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # whoever writes there says what is wrong with the directory
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another {command} is running in --output={folder}; wait for it, or give another directory"
                ) from None
        yield


def end(process: subprocess.Popen[bytes], seconds: float = 45.0) -> None:
    """Terminate a process and wait; torchrun needs up to 30 s to end its ranks, a run that saves may need longer."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_with_parent() -> None:
    """Have this process terminated when its parent dies; for ``preexec_fn``."""
    with suppress(OSError, AttributeError):  # Linux alone
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
