"""The run directory, in which one job at a time may write."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

from megatron_mosa.config import Config, save_config
from megatron_mosa.errors import UserError
from megatron_mosa.utils import creation_problem

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # from file systems without locks, as some networks' are

_FILES = ("config.yaml", "metrics.jsonl", "status.json", "loss.png")
_FOLDERS = ("checkpoints", "tensorboard")


class RunDirectory:
    """Locks ``runs/NAME`` for this job, for as long as the object and the process exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def prepare(self, config: Config) -> None:
        """Create and lock the directory, and write config.yaml. Only the main rank calls this.

        Raises:
            UserError: the directory cannot be written, or another job uses it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w", encoding="utf-8")
            # Not flock: its lock would be inherited by data loader processes, which outlive this one after kill -9.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if self._lock is None:
                raise UserError(_unwritable(self.path, error.strerror)) from None
            raise UserError(
                f"run directory '{self.path}' is in use by another job; wait for that job, end it, or give this run "
                "another name (run.name=...)"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(_unwritable(self.path, error.strerror)) from None
        save_config(config, self.path / "config.yaml")


def check_writable(path: Path) -> None:
    """Check that a run directory can be created and written, without creating it.

    Raises:
        UserError: nothing can be created in it, or one of its files or folders is of another kind or not writable.
    """
    for name in (*_FILES, *_FOLDERS):
        if not os.path.lexists(path / name):
            continue
        kind, is_right = ("directory", os.path.isdir) if name in _FOLDERS else ("file", os.path.isfile)
        if not is_right(path / name):
            raise UserError(_unwritable(path / name, f"{path / name} is not a {kind}"))
        if not os.access(path / name, os.W_OK):
            raise UserError(_unwritable(path, f"{path / name} is not writable"))
    checkpoints = path / "checkpoints"  # which may be a link to another file system
    for folder in (checkpoints if os.path.lexists(checkpoints) else path, path):
        if (problem := creation_problem(folder)) is not None:
            raise UserError(_unwritable(folder, problem))


def _unwritable(path: Path, reason: str | None) -> str:
    return f"run directory '{path}' cannot be written ({reason}); set run.directory to a writable directory"
