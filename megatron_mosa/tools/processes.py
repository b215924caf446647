"""Processes that a tool starts, and the directory that it writes alone."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megatron_mosa.errors import UserError

Process = subprocess.Popen[bytes]


@contextmanager
def signals_as_interrupt() -> Iterator[Callable[[], None]]:
    """Treat SIGTERM as Ctrl-C, so that started processes are ended and results are written.

    Likewise SIGHUP, the end of a terminal or an SSH connection, unless it is ignored, as under nohup.

    Yields:
        A function that raises KeyboardInterrupt if such a signal has come. A loop that starts processes must call it,
        because Python ignores what a signal's handler raises while it forks.
    """
    has_come = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal has_come
        if number == signal.SIGHUP and has_come:  # a terminal that is closed sends it twice
            return
        has_come = True
        raise KeyboardInterrupt

    def check() -> None:
        if has_come:
            raise KeyboardInterrupt

    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = (signal.SIGTERM,) if is_ignored else (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def end(process: Process, seconds: float = 45.0) -> None:
    """Terminate a process and wait; torchrun needs up to 30 s to end its ranks, a run that saves may need longer."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start(command: Sequence[str], environment: Mapping[str, str], log: Path, *, append: bool = False) -> Process:
    """Start a program whose output goes to a file.

    It ends when this process dies. Signals of the terminal do not reach it: this process ends what it has started.
    """
    with log.open("a" if append else "w", encoding="utf-8") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    with suppress(OSError, AttributeError):  # Linux alone
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
