"""Requests to stop, from signals and from the job's time limit, agreed upon by all ranks."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mosa.parallel import Hosts

# SIGUSR1 is a notice (Slurm's --signal), the others ask at once. Their order is that of precedence where ranks differ.
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
TIME_LIMIT = "the time limit is near"
REASONS = (*(number.name for number in SIGNALS), TIME_LIMIT)


def hold_notice() -> None:
    """Have SIGUSR1 wait until ``Signals`` listens; until then it would end the process, which imports for a while."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


class Signals:
    """Notes the first signal that asks this process to stop; the second of a kind ends it now.

    A handler in Python runs between two instructions of the main thread, which may be waiting for another rank inside a
    collective. So the C handler's byte on a socket (``signal.set_wakeup_fd``) is read by a thread, and the second
    signal ends a process that hangs, too.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int] = {}
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)

    def listen(self) -> None:
        """Begin; in the main thread."""
        for number in SIGNALS:  # None: a handler that is no Python's, and cannot be given back
            self._before[number] = signal.signal(number, lambda *_: None) or signal.SIG_DFL
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_leave_to_the_parent)  # loader processes get the job's signals, too
        threading.Thread(target=self._read, name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # see hold_notice

    def close(self) -> None:
        """Give back the handlers that were there before.

        After a signal was heeded the process is about to end, and keeps its exit code: others are ignored. (Launchers
        end all processes when the first has another exit code than 0.)
        """
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.received else handler)
        self._writing.close()  # ends the thread

    def _read(self) -> None:
        with self._reading:
            while data := self._reading.recv(64):
                for byte in data:
                    self._note(signal.Signals(byte))

    def _note(self, number: signal.Signals) -> None:
        if number in self.received:
            os.write(2, f"{number.name} for the second time: exiting now\n".encode())
            os._exit(128 + number)
        if number in SIGNALS:
            self.received.append(number)


def _leave_to_the_parent() -> None:
    signal.set_wakeup_fd(-1)


class Interruption:
    """Whether the run is to stop, the same on every rank."""

    def __init__(self, signals: Signals, deadline: float | None) -> None:
        """
        Args:
            signals: this process's.
            deadline: when to stop, in Unix time; None: no limit. One rank's is enough, and clocks differ.
        """
        self.signals = signals
        self.deadline = deadline
        self.hosts: Hosts | None = None
        """Who agrees; None: this process alone."""
        self._reason: str | None = None

    def agreed(self) -> str | None:
        """Why to stop now: one of ``REASONS``; None: go on. A collective."""
        if self._reason is None:
            code = self._own() if self.hosts is None else self.hosts.largest(self._own())
            self._reason = REASONS[code - 1] if code else None
        return self._reason

    def _own(self) -> int:
        """The number of this process's reason, from 1; 0: none."""
        if self.signals.received:
            return 1 + SIGNALS.index(self.signals.received[0])
        is_late = self.deadline is not None and time.time() >= self.deadline
        return 1 + REASONS.index(TIME_LIMIT) if is_late else 0
