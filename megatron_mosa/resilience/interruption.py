"""Requests to stop, from signals, the job's time limit or a full disk, that all ranks agree on."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

from megatron_mosa.exit_codes import TIME_LIMIT

if TYPE_CHECKING:
    from megatron_mosa.parallel import HostGroup

# SIGUSR1 is an advance notice (Slurm's --signal), SIGHUP the end of a terminal or an SSH connection. Where ranks have
# different reasons, the last in this order wins.
SIGNALS = (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
UNWRITABLE = "a file could not be written"
REASONS = (*(number.name for number in SIGNALS), TIME_LIMIT, UNWRITABLE)


def block_sigusr1() -> None:
    """Block SIGUSR1 until ``Signals`` listens: before that it would end the process, whose imports take a while."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


class Signals:
    """Records signals that ask this process to stop; a second one of the same kind, but SIGHUP, ends it at once.

    A Python handler runs between two instructions of the main thread, which may be waiting for another rank inside a
    collective. So a thread reads the bytes that the C handler writes to a socket (``signal.set_wakeup_fd``), and the
    second signal ends even a process that hangs.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int] = {}
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)

    def listen(self) -> None:
        """Install the handlers; must run in the main thread. Under nohup, SIGHUP stays ignored."""
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            # None: a handler from C, which cannot be restored
            self._before[number] = signal.signal(number, lambda *_: None) or signal.SIG_DFL
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_ignore_signals_in_child)  # loader processes receive the job's signals, too
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see block_sigusr1

    def close(self) -> None:
        """Restore the previous handlers.

        After a signal the process is about to end and must keep its exit code, so further signals are ignored.
        (Launchers signal all processes once the first exits with a nonzero code.)
        """
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.received else handler)
        self._writing.close()  # ends the reader thread

    def _read(self) -> None:
        with self._reading:
            while data := self._reading.recv(64):
                for byte in data:
                    self._note(signal.Signals(byte))

    def _note(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP and number in self.received:
            return  # a terminal that is closed sends it twice: by its shell and by the kernel
        if number in self.received:
            with suppress(OSError):  # its reader may have left, or its disk be full
                os.write(2, f"received {number.name} a second time: exiting now\n".encode())
            os._exit(128 + number)
        if number in SIGNALS:
            self.received.append(number)


def _ignore_signals_in_child() -> None:
    signal.set_wakeup_fd(-1)


class Interruption:
    """Decides whether the run should stop, identically on every rank."""

    def __init__(self, signals: Signals, deadline: float | None) -> None:
        """
        Args:
            signals: the signals of this process.
            deadline: Unix time at which to stop; None: no limit. One rank's deadline is enough, as clocks differ.
        """
        self.signals = signals
        self.deadline = deadline
        self.hosts: HostGroup | None = None
        """The ranks that must agree; None: this process decides alone."""
        self.cannot_write = False
        """Whether this process cannot write what the run must not do without."""
        self._reason: str | None = None

    def stop_as_unwritable(self) -> None:
        """Have all ranks stop at the next call of ``agreed_reason``, since this one cannot write a file."""
        self.cannot_write = True

    def agreed_reason(self) -> str | None:
        """Return why to stop now, one of ``REASONS``, or None to continue. A collective."""
        if self._reason is None:
            code = self._own() if self.hosts is None else self.hosts.max(self._own())
            self._reason = REASONS[code - 1] if code else None
        return self._reason

    def _own(self) -> int:
        """Return the number of this process's reason, from 1, or 0 for none."""
        if self.cannot_write:
            return 1 + REASONS.index(UNWRITABLE)
        if self.signals.received:
            return 1 + SIGNALS.index(self.signals.received[0])
        is_late = self.deadline is not None and time.time() >= self.deadline
        return 1 + REASONS.index(TIME_LIMIT) if is_late else 0
