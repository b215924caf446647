"""A watchdog that ends a process that makes no progress, after dumping the stacks of all threads."""

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
from megatron_mosa.resilience.stopped import kill_stopped_ranks

GRACE_SECONDS = 10.0
"""Delay from the dump to the exit, so that the other ranks' watchdogs, which fire slightly later, dump, too."""


class Watchdog:
    """Ends the process, from a thread, unless the run reports progress in time.

    One rank that hangs keeps all others waiting in a collective, so every rank's watchdog fires, and the rank whose
    stack differs is the culprit.
    """

    def __init__(self, directory: Path, rank: int, timeout: float, on_hang: Callable[[], object]) -> None:
        """
        Args:
            directory: where stacks are written, as ``rank-00000.txt`` and so on.
            rank: this process's rank.
            timeout: seconds without progress after which it fires; 0: never.
            on_hang: called in the watchdog's thread before the exit.
        """
        self.file = directory / f"rank-{rank:05d}.txt"
        self.timeout = timeout
        self._on_hang = on_hang
        self.doing = "starting"  # what the run does until the next beat
        self._last = time.monotonic()
        self._ended = threading.Event()

    def start(self) -> None:
        """Start the thread, unless the timeout is 0."""
        if self.timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Report progress, and what the run will be doing until the next call."""
        self.doing, self._last = doing, time.monotonic()

    def close(self) -> None:
        """Stop watching; also cancels an exit during its grace period."""
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
                reason = f"no progress for {self.timeout:.0f} s while {self.doing}"
                self.end_process(reason, HUNG, GRACE_SECONDS, self._on_hang)

    def end_process(self, reason: str, code: int, grace: float, last_words: Callable[[], object]) -> None:
        """Dump the stacks, and end the process and stopped ranks unless ``close`` is called in time; from any thread.

        Args:
            reason: what is reported with the stacks.
            code: the exit code.
            grace: seconds from the dump to the exit.
            last_words: called before the exit.
        """
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {reason}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        with suppress(OSError, ValueError):  # its reader may have left, or its disk be full
            print(f"watchdog: {reason}; stacks in {self.file}; ending this process", file=sys.stderr, flush=True)
        if self._ended.wait(grace):
            return
        for last in (last_words, kill_stopped_ranks):
            with suppress(Exception):
                last()
        os._exit(code)
