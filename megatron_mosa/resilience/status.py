"""status.json of a run directory: how the run is, for people, ``mosa status`` and batch scripts."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_mosa.exit_codes import NAMES
from megatron_mosa.utils.files import write_atomically

STATUS = "status.json"
RUNNING = "running"
_SECONDS_BETWEEN = 2.0


class RunStatus:
    """Writes how a run is; on other ranks than the main one, nothing while it runs."""

    def __init__(self, directory: Path, *, is_main: bool) -> None:
        self.path = directory / STATUS
        self.is_main = is_main
        self.is_ours = False
        self._written = 0.0
        self._content: dict[str, Any] = {
            "state": RUNNING,
            "attempt": os.environ.get("MOSA_ATTEMPT"),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": time.time(),
        }

    def begin(self) -> None:
        """From now on the run directory is this job's, and its status, too."""
        self._take_over(read_status(self.path.parent) or {})
        self.update("starting")

    def _take_over(self, before: dict[str, Any]) -> None:
        kept = {key: before[key] for key in ("step", "loss", "checkpoint", "checkpoint_time") if key in before}
        self._content = kept | self._content | {"starts": before.get("starts", 0) + 1}
        self.is_ours = True

    def update(self, doing: str, **facts: Any) -> None:
        """Note what the run is doing; written if the last time is 2 s ago, or if it is doing something else."""
        is_news = doing != self._content.get("doing")
        self._content |= {"doing": doing} | facts
        if self.is_main and self.is_ours and (is_news or time.time() - self._written >= _SECONDS_BETWEEN):
            self._write()

    def end(self, code: int, reason: str = "") -> None:
        """Note how it ended; for any rank. The first to say so is nearest to the cause, and is believed.

        What ends before it begins, by a mistake, is noted for a batch script (MOSA_ATTEMPT) alone: other processes may
        be at work in the run directory.
        """
        before = read_status(self.path.parent) or {}
        attempt = self._content["attempt"]
        if not self.is_ours and attempt is not None:
            if before.get("attempt") != attempt:
                self._take_over(before)
                before = self._content
            self.is_ours = True
        if not self.is_ours or before.get("state", RUNNING) != RUNNING:
            return
        ending = {"state": NAMES.get(code, NAMES[1]), "exit_code": code, "reason": reason}
        self._content = (before | self._content if self.is_main else self._content | before) | ending
        self._write()

    def _write(self) -> None:
        """Best effort: a full disk must not end a run for its status."""
        self._written = self._content["updated"] = time.time()
        with suppress(OSError):
            write_atomically(self.path, json.dumps(self._content, indent=1) + "\n")


def read_status(directory: Path) -> dict[str, Any] | None:
    """What was last written; None: nothing that can be read."""
    try:
        content = json.loads((directory / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
