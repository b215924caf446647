"""Output of a run: the terminal, metrics.jsonl, TensorBoard and W&B."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mosa.config import Config
from megatron_mosa.metrics import NON_CAUSAL, Journal, kind, scalars
from megatron_mosa.train.wandb_run import WandbRun
from megatron_mosa.utils import decimals, file_problem, first_line, naming, say, tolerating

_NO_TENSORBOARD = "TensorBoard gets no more events"


class Writers:
    """Sends each training or validation line to all outputs, on the main rank only.

    A run ends in order, with a checkpoint, if metrics.jsonl cannot be written; it goes on without the other outputs.
    Lines that could not be written even at the end are only in the output of the terminal: they are those of the last
    step, and repeating it for them would cost more than they are worth.

    Args:
        resumed_step: lines of later steps are dropped.
        on_failure: called when metrics.jsonl could not be written.
    """

    def __init__(
        self,
        config: Config,
        run_directory: Path,
        *,
        is_main: bool,
        resumed_step: int,
        on_failure: Callable[[], object] = lambda: None,
    ) -> None:
        self.config = config
        self.run_directory = run_directory
        self.is_main = is_main
        self.resumed_step = resumed_step
        self.last_step = config.train.steps
        self.journal: Journal | None = None
        self.wandb: WandbRun | None = None
        self.tensorboard: Any = None
        self.failure: str | None = None
        """Why metrics.jsonl could not be written, in one line."""

        self._on_failure = on_failure
        self._unwritten: list[dict[str, Any]] = []

    def start(self) -> None:
        """Open the outputs on the main rank, which the first line or rewind does otherwise.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        if not self.is_main:
            return
        # Before the journal drops the lines of steps that will be repeated: WandbRun must see them.
        if self.config.logging.wandb_project:
            with self._tolerating_wandb():
                self.wandb = WandbRun(self.config, self.run_directory, self.resumed_step)
        self.journal = Journal(self.run_directory / "metrics.jsonl", self.resumed_step)
        if self.journal.damage is not None:
            self.note(self.journal.damage)
        if self.config.logging.tensorboard:
            self._open_tensorboard(self.resumed_step)

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, whose steps will be repeated.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        if not self.is_main:
            return
        path = self._opened().path
        if self.wandb is not None:
            with self._tolerating_wandb():
                self.wandb.rewind(step)
        self.journal = Journal(path, step)
        if self.tensorboard is not None:
            self._close_tensorboard()
            self._open_tensorboard(step)

    def _opened(self) -> Journal:
        if self.journal is None:
            self.start()
        assert self.journal is not None
        return self.journal

    def _open_tensorboard(self, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        folder = self.run_directory / "tensorboard"
        _silence_tensorboard()
        with tolerating(_NO_TENSORBOARD), naming(folder):
            self.tensorboard = SummaryWriter(folder, purge_step=resumed_step + 1)

    def _close_tensorboard(self) -> None:
        writer, self.tensorboard = self.tensorboard, None
        if writer is not None:
            with tolerating(_NO_TENSORBOARD), naming(self.run_directory / "tensorboard"):
                writer.close()

    def note(self, text: str) -> None:
        """Print a line with the time."""
        if self.is_main:
            say(f"[{time.strftime('%H:%M:%S')}] {text}")

    @property
    def last_training_step(self) -> int:
        """The step of the last training line; 0 without one, and on other ranks."""
        return 0 if self.journal is None else self.journal.last_training_step

    def training(self, line: dict[str, Any], seconds_left: float) -> None:
        """Record a training line of metrics.jsonl, and print it with the seconds left; NaN: no step was taken."""
        if not self.is_main:
            return
        self._record(line)
        if math.isnan(seconds_left):  # it was skipped, which has been said
            return
        minutes, seconds = divmod(round(seconds_left), 60)
        self.note(
            f"step {line['step']}/{self.last_step}  loss {line['loss']:.4f}  grad norm {line['grad_norm']:.3f}  "
            f"lr {line['learning_rate']:.2e}  {line['tokens_per_second']:,.0f} tokens/s  MFU {line['mfu']:.1%}  "
            f"{line['peak_memory_gib']:.2f} GiB  {minutes}:{seconds:02d} left"
        )

    def validation(self, line: dict[str, Any]) -> None:
        """Record a validation line of metrics.jsonl, and print it."""
        if not self.is_main:
            return
        self._record(line)
        of = f"/{self.last_step}" if line["step"] <= self.last_step else ""  # it may have resumed past its last step
        label = "" if line["causal"] else f"  ({NON_CAUSAL})"
        self.note(
            f"step {line['step']}{of}  validation loss {line['validation_loss']:.4f}  "
            f"perplexity {decimals(line['validation_perplexity'])}{label}"
        )

    def close(self) -> None:
        """Flush and close all outputs."""
        if not self.is_main:
            return
        self._write_journal()
        self._close_tensorboard()
        if self.wandb is not None:
            with self._tolerating_wandb():
                self.wandb.finish()

    def _record(self, line: dict[str, Any]) -> None:
        self._opened()
        per_head = {key: value for key, value in line.items() if isinstance(value, list) and _is_per_head(value)}
        line = {key: value for key, value in line.items() if key not in per_head}
        self._unwritten.append(line)  # without values per head: the file would grow to gigabytes
        self._write_journal()
        numbers = scalars(line)
        histograms = {
            f"{kind(line)}/{key}/layer_{number}": values
            for key, layers in per_head.items()
            for number, values in enumerate(layers)
        }
        if self.tensorboard is not None:
            self._write_tensorboard(numbers, histograms, line["step"])
        if self.wandb is not None:
            with self._tolerating_wandb():
                self.wandb.log(numbers, histograms, line["step"])

    @contextmanager
    def _tolerating_wandb(self) -> Iterator[None]:
        """Go on without W&B after an error, whose type may be of any library below it, and say so once."""
        try:
            yield
        except Exception as error:
            self.wandb = None
            self.note(f"W&B gets no more rows until the next start, which adds them: {_reason(error)}")

    def _write_journal(self) -> None:
        """Write the lines that are not written yet, of earlier failures too."""
        try:
            while self._unwritten:
                self._opened().write(self._unwritten[0])
                del self._unwritten[0]
        except OSError as error:
            if self.failure is None:
                self.failure = file_problem(error)
                self._on_failure()

    def _write_tensorboard(self, numbers: dict[str, float], histograms: dict[str, list[float]], step: int) -> None:
        writer, self.tensorboard = self.tensorboard, None  # which it stays if this fails
        with tolerating(_NO_TENSORBOARD), naming(self.run_directory / "tensorboard"):
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)
            for name, values in histograms.items():
                writer.add_histogram(name, np.array(values), step)
            writer.flush()  # so that it survives a crash as the journal does
            self.tensorboard = writer


def _silence_tensorboard() -> None:
    """Let TensorBoard's threads end without a traceback: their errors are raised again by the next call."""
    before = threading.excepthook

    def report(failure: Any) -> None:
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            before(failure)

    threading.excepthook = report


def _is_per_head(value: list[Any]) -> bool:
    """Whether a list has a list for each layer instead of a number."""
    return bool(value) and isinstance(value[0], list)


def _reason(error: Exception) -> str:
    """Return an error of wandb in one line; the first line of one about its settings says only how many there are."""
    lines = [line.strip() for line in str(error).splitlines()]
    is_of_settings = type(error).__name__ == "ValidationError"  # pydantic's, on which wandb alone depends
    return ": ".join(lines[1:3]) if is_of_settings else first_line(error)
