"""Ends a process that makes no progress, and leaves behind what every thread was doing."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_mosa.exit_codes import HUNG

GRACE_SECONDS = 10.0
"""From the dump to the exit: the other ranks' watchdogs, whose clocks began at another moment, dump, too."""


class Watchdog:
    """A thread that wants to hear from the run.

    One rank that hangs keeps all others waiting in a collective, so that every rank's watchdog goes off, and the one
    whose stack differs is the culprit.
    """

    def __init__(self, directory: Path, rank: int, timeout: float, on_hang: Callable[[], object]) -> None:
        """
        Args:
            directory: where stacks are written: ``rank-00000.txt`` and so on.
            rank: of this process.
            timeout: seconds without a sign of life; 0: never goes off.
            on_hang: called before the exit, in the thread.
        """
        self.file = directory / f"rank-{rank:05d}.txt"
        self.timeout = timeout
        self._on_hang = on_hang
        self._doing = "starting"
        self._last = time.monotonic()
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to wait."""
        if self.timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """A sign of life, and what the run will be doing until the next."""
        self._doing, self._last = doing, time.monotonic()

    def close(self) -> None:
        """Wait no longer."""
        self._ended.set()

    def _watch(self) -> None:
        interval = min(1.0, self.timeout / 10)
        checked = time.monotonic()
        while not self._ended.wait(interval):
            now = time.monotonic()
            if now - checked > max(10 * interval, 5.0):  # the process itself was stopped, or the machine slept
                self._last += now - checked
            checked = now
            if now - self._last > self.timeout:
                self._bark()

    def _bark(self) -> None:
        told = f"no progress for {self.timeout:.0f} s while {self._doing}"
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {told}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        print(f"watchdog: {told}; stacks in {self.file}; ending this process", file=sys.stderr, flush=True)
        if self._ended.wait(GRACE_SECONDS):
            return
        with suppress(Exception):
            self._on_hang()
        os._exit(HUNG)
