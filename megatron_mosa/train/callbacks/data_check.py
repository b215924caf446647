"""Hashes large datasets while the run trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_mosa.data import FileHash, HashingProcess
from megatron_mosa.engine import StepResult
from megatron_mosa.errors import UserError
from megatron_mosa.parallel import on_main_rank
from megatron_mosa.train.trainer import Callback, Trainer
from megatron_mosa.train.writers import Writers
from megatron_mosa.utils import counted


class DataCheck(Callback):
    """Compares the dataset's hashes on the main rank while the run trains, and ends the run if they differ.

    Args:
        files: the files to hash; the same on every rank.
        newest: describes the newest checkpoint, for the error message.
    """

    def __init__(self, writers: Writers, files: Sequence[FileHash], newest: Callable[[], str]) -> None:
        self.writers = writers
        self.newest = newest
        self.is_running = bool(files)
        self._process = HashingProcess(files) if files and writers.is_main else None
        if files:
            writers.note(f"hashing {counted(len(files), 'file')} of the dataset in the background")

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Check whether the comparison has finished. A collective until then.

        Raises:
            UserError: a file is damaged; raised on every rank.
        """
        if not self.is_running or not trainer.any_rank(self._process is not None and self._process.is_over):
            return
        self.is_running = False
        self.writers.note(on_main_rank(lambda: self._outcome(trainer.state.step)))

    def on_end(self, trainer: Trainer) -> None:
        """End the hashing process."""
        if self._process is not None:
            self._process.close()

    def _outcome(self, step: int) -> str:
        assert self._process is not None
        damage, code = self._process.damage(), self._process.exit_code
        self._process.close()
        self._process = None
        if damage is not None:
            raise UserError(f"{damage}; the run stopped at step {step}, {self.newest()}")
        if code != 0:  # killed, for instance for want of memory
            return f"the dataset was not verified: hashing it ended with exit code {code}; use mosa data verify FOLDER"
        return "the dataset is intact: all hashes match its manifest"
