"""Messages of libraries: those of a run go into a file, and known noise goes nowhere."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

_NOISE = {
    "megatron.core.models.gpt.gpt_model": re.compile("deprecated", re.IGNORECASE),  # at every model that is built
    "transformers.generation.stopping_criteria": re.compile("friendly reminder"),  # we say more about it
    "huggingface_hub.utils._http": re.compile("thrown while requesting|^Retrying in"),  # the error says it in the end
}
"""Loggers, and what of theirs no user needs to read."""

_OWN_HANDLERS = ("DeepSpeed", "torch", "transformers")
"""Libraries whose loggers have handlers of their own, which would write to the terminal."""


class LibraryLog(logging.Handler):
    """Takes the place of Python's handler of last resort, which prints warnings to stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.path: Path | None = None
        """The file; None: stderr. An empty path: nowhere."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message; what cannot be written is lost, since a full disk must not end a run over it."""
        with suppress(OSError, ValueError):
            text = self.format(record)
            if self.path is None or record.levelno >= logging.ERROR or record.name.startswith("megatron_mosa"):
                print(text, file=sys.stderr)
            if self.path is not None and self.path.name:
                stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"[{stamp}] {record.name}: {text.strip()}\n")


_log = LibraryLog()


def drop_known_noise() -> None:
    """Drop messages that say nothing to a user of any program; all others still appear on stderr."""
    logging.lastResort = _log
    for name, pattern in _NOISE.items():
        logger = logging.getLogger(name)
        logger.filters[:] = [lambda record, noise=pattern: bool(_log.path) or not noise.search(record.getMessage())]


def log_libraries(path: Path | None) -> None:
    """Write warnings of libraries to a file from now on, and only errors to stderr, too.

    Args:
        path: the file, which is created at the first message; None: warnings go nowhere, as on ranks that write no log.
    """
    _log.path = path or Path()
    logging.lastResort = _log
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").handlers[:] = [_log]
    for logger in _loggers_with_handlers(*_OWN_HANDLERS):
        logger.handlers[:] = [_log]


def drop_warnings(library: str) -> None:
    """Let only errors of a library, which is imported, appear on stderr."""
    for logger in _loggers_with_handlers(library):
        for handler in logger.handlers:
            handler.setLevel(logging.ERROR)


def _loggers_with_handlers(*libraries: str) -> list[logging.Logger]:
    """Return the loggers of libraries that write by themselves; torch's not if TORCH_LOGS asks for them."""
    asked = ("torch",) if "TORCH_LOGS" in os.environ else ()
    known = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    wanted = set(libraries).difference(asked)
    return [logger for logger in known if logger.handlers and logger.name.partition(".")[0] in wanted]
