"""The progress of a sweep on the terminal."""

from __future__ import annotations

import time

from megatron_mosa.tools.scaling.session import Event
from megatron_mosa.tools.scaling.sweep_work import Work
from megatron_mosa.utils import say

_LINE_SECONDS = 10.0  # between two lines within a phase


class Progress:
    """Prints what sessions are doing; ``watch`` is a ``session.Watch``."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._started = time.monotonic()
        self._shown: tuple[str, str] = ("", "")
        self._shown_at = 0.0
        self._done = 0

    def print_known(self) -> None:
        """Print the cells that need not be run, and how many are left."""
        for row in self.work.rows():
            if row.is_measured or row.cell in self.work.too_large:
                say(f"{row.line}{' (kept)' if row.is_measured else ''}")
        say(f"{len(self.work.missing)} to measure")

    def watch(self, event: Event) -> None:
        """Print what a session is doing: each phase, and within a phase at most one line in ten seconds."""
        missing = self.work.missing
        cell = next((cell for cell in missing if cell.name == event.cell), None)
        if cell is None:
            return
        counter = f"[{min(self._done + 1, len(missing))}/{len(missing)}]"
        if event.phase in ("done", "failed"):
            self._done += 1
            row = next(row for row in self.work.rows() if row.cell == cell)
            left = (time.monotonic() - self._started) / self._done * (len(missing) - self._done)
            say(f"{counter} {row.line}; {left:.0f} s left")
            return
        key, now = (event.cell, event.phase), time.monotonic()
        if key == self._shown and now - self._shown_at < _LINE_SECONDS:
            return
        self._shown, self._shown_at = key, now
        step = f", step {event.step}/{event.of}" if event.of else ""
        say(f"{counter} {cell}: {event.phase}{step}")
