"""status.json in the run directory: the state of a run, for people, ``mosa status`` and batch scripts."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from megatron_mosa.exit_codes import NAMES
from megatron_mosa.utils import load_json, tolerating, write_atomically

STATUS = "status.json"
RUNNING = "running"
_WRITE_INTERVAL_SECONDS = 2.0


class RunStatus:
    """Writes the state of a run; while it is running, only the main rank writes."""

    def __init__(self, directory: Path, *, is_main: bool) -> None:
        self.path = directory / STATUS
        self.is_main = is_main
        self.owns_directory = False
        self._written = 0.0
        self._content: dict[str, Any] = {
            "state": RUNNING,
            "attempt": os.environ.get("MOSA_ATTEMPT"),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restarts": int(restarts) if (restarts := os.environ.get("SLURM_RESTART_COUNT", "")).isdecimal() else 0,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": time.time(),
        }

    def begin(self) -> None:
        """Claim the run directory's status for this job."""
        self._take_over(read_status(self.path.parent) or {})
        self.update("starting")

    def _take_over(self, before: dict[str, Any]) -> None:
        kept = {key: before[key] for key in ("step", "loss", "checkpoint", "checkpoint_time") if key in before}
        self._content = kept | self._content | {"starts": before.get("starts", 0) + 1}
        self.owns_directory = True

    def update(self, doing: str, **facts: Any) -> None:
        """Record what the run is doing; writes if the activity changed or the last write was at least 2 s ago."""
        has_changed = doing != self._content.get("doing")
        self._content |= {"doing": doing} | facts
        if (
            self.is_main
            and self.owns_directory
            and (has_changed or time.time() - self._written >= _WRITE_INTERVAL_SECONDS)
        ):
            self._write()

    def end(self, code: int, reason: str = "") -> None:
        """Record how the run ended; any rank may call it. The first reason is kept, as it is closest to the cause.

        A user's mistake that ends a run before ``begin`` is recorded only under a batch script (MOSA_ATTEMPT), since
        other processes may be using the run directory.
        """
        before = read_status(self.path.parent) or {}
        attempt = self._content["attempt"]
        if not self.owns_directory and attempt is not None:
            if before.get("attempt") != attempt:
                self._take_over(before)
                before = self._content
            self.owns_directory = True
        if not self.owns_directory or before.get("state", RUNNING) != RUNNING:
            return
        ending = {"state": NAMES.get(code, NAMES[1]), "exit_code": code, "reason": reason}
        self._content = (before | self._content if self.is_main else self._content | before) | ending
        self._write()

    def _write(self) -> None:
        """Write, best effort: a full disk must not end a run over its status."""
        self._written = self._content["updated"] = time.time()
        with tolerating("mosa status will show an earlier state"):
            write_atomically(self.path, json.dumps(self._content, indent=1) + "\n")


def read_status(directory: Path) -> dict[str, Any] | None:
    """Return the status last written, or None if there is none that can be read."""
    try:
        content = load_json(directory / STATUS)
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    values = [(content.get(name), kinds) for kinds, names in _TYPES.items() for name in names]
    return content if all(value is None or _fits(value, kinds) for value, kinds in values) else None


_TYPES = {
    (str,): ("state", "reason", "doing", "checkpoint", "host", "attempt", "job"),
    (int,): ("step", "last_step", "skipped_steps", "starts", "exit_code"),
    (int, float): ("updated", "seconds_per_step", "tokens_per_second", "loss", "checkpoint_time"),
}
"""What whoever reads a status relies on."""


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and (value == value or float not in kinds)
