"""Large datasets are hashed beside the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_mosa.data import FileHash, HashingProcess
from megatron_mosa.engine import StepResult
from megatron_mosa.errors import UserError
from megatron_mosa.parallel import on_main_rank
from megatron_mosa.train.trainer import Callback, Trainer
from megatron_mosa.train.writers import Writers


class DataCheck(Callback):
    """Has the main rank compare the dataset's hashes while the run trains, and ends the run if they differ.

    Args:
        files: what to compare; every rank is given the same.
        newest: says which checkpoint is the newest, for the message.
    """

    def __init__(self, writers: Writers, files: Sequence[FileHash], newest: Callable[[], str]) -> None:
        self.writers = writers
        self.newest = newest
        self.is_going_on = bool(files)
        self._process = HashingProcess(files) if files and writers.is_main else None
        if files:
            writers.note(f"hashing {len(files)} files of the dataset beside the run")

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Look whether the comparison is over; a collective until it is.

        Raises:
            UserError: on every rank: a file is damaged.
        """
        if not self.is_going_on or not trainer.any_rank(self._process is not None and self._process.is_over):
            return
        self.is_going_on = False
        damage = on_main_rank(self._end)
        if damage is not None:
            raise UserError(f"{damage}; the run stopped at step {trainer.state.step}, {self.newest()}")
        self.writers.note("the dataset is sound: all hashes are those of its manifest")

    def on_end(self, trainer: Trainer) -> None:
        """Leave no process behind."""
        if self._process is not None:
            self._process.close()

    def _end(self) -> str | None:
        assert self._process is not None
        found = self._process.damage()
        self._process.close()
        self._process = None
        return found
