"""The run directory: one job at a time writes there."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from megatron_mosa.config import Config, save_config
from megatron_mosa.errors import UserError

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems


class RunDirectory:
    """Holds ``runs/NAME`` for this job: as long as the object lives and the process runs, no other job gets it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def prepare(self, config: Config) -> None:
        """Make the directory, lock it, write config.yaml; for the main rank.

        Raises:
            UserError: it cannot be written, or another job holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w", encoding="utf-8")
            # A lock of this process alone: flock's would go on with loader processes, which outlive it after kill -9.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if self._lock is None:
                raise UserError(_unwritable(self.path, error.strerror)) from None
            raise UserError(
                f"run directory '{self.path}' is in use by another job; wait for it, end it, or give this run another "
                "name (run.name=...)"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(_unwritable(self.path, error.strerror)) from None
        save_config(config, self.path / "config.yaml")


def check_writable(path: Path) -> None:
    """Refuse a directory that could not be made or written, without making it.

    Raises:
        UserError: the nearest existing folder above it is none, or is not writable.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise UserError(_unwritable(path, f"{existing} is no folder"))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(_unwritable(path, f"{existing} is not writable"))


def _unwritable(path: Path, reason: str | None) -> str:
    return f"run directory '{path}' cannot be written ({reason}); set run.directory to a writable folder"
