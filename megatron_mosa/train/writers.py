"""Output of a run: the terminal, metrics.jsonl, TensorBoard and W&B."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mosa.config import Config
from megatron_mosa.metrics import NON_CAUSAL, Journal, kind, scalars
from megatron_mosa.train.wandb_run import WandbRun


class Writers:
    """Sends each training or validation line to all outputs, on the main rank only."""

    def __init__(self, config: Config, run_directory: Path, *, is_main: bool, resumed_step: int) -> None:
        self.is_main = is_main
        self.last_step = config.train.steps
        if not is_main:
            return
        # Before the journal drops the lines of steps that will be repeated: WandbRun must see them.
        self.wandb = WandbRun(config, run_directory, resumed_step) if config.logging.wandb_project else None
        self.journal = Journal(run_directory / "metrics.jsonl", resumed_step)
        if self.journal.damage is not None:
            self.note(self.journal.damage)
        self.tensorboard: Any = None
        if config.logging.tensorboard:
            self._open_tensorboard(resumed_step)

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, whose steps will be repeated."""
        if not self.is_main:
            return
        if self.wandb is not None:
            self.wandb.rewind(step)
        self.journal = Journal(self.journal.path, step)
        if self.tensorboard is not None:
            self.tensorboard.close()
            self._open_tensorboard(step)

    def _open_tensorboard(self, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.tensorboard = SummaryWriter(self.journal.path.parent / "tensorboard", purge_step=resumed_step + 1)

    def note(self, text: str) -> None:
        """Print a line with the time."""
        if self.is_main:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def training(self, line: dict[str, Any], seconds_left: float) -> None:
        """Record a training line of metrics.jsonl, and print it with the time left in seconds."""
        if not self.is_main:
            return
        self._record(line)
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
        label = "" if line["causal"] else f"  ({NON_CAUSAL})"
        self.note(
            f"step {line['step']}/{self.last_step}  validation loss {line['validation_loss']:.4f}  "
            f"perplexity {line['validation_perplexity']:.2f}{label}"
        )

    def close(self) -> None:
        """Flush and close all outputs."""
        if not self.is_main:
            return
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _record(self, line: dict[str, Any]) -> None:
        per_head = {key: value for key, value in line.items() if isinstance(value, list) and _is_per_head(value)}
        line = {key: value for key, value in line.items() if key not in per_head}
        self.journal.write(line)  # without values per head: the file would grow to gigabytes
        numbers = scalars(line)
        histograms = {
            f"{kind(line)}/{key}/layer_{number}": values
            for key, layers in per_head.items()
            for number, values in enumerate(layers)
        }
        if self.tensorboard is not None:
            for name, number in numbers.items():
                self.tensorboard.add_scalar(name, number, line["step"])
            for name, values in histograms.items():
                self.tensorboard.add_histogram(name, np.array(values), line["step"])
            self.tensorboard.flush()  # so that it survives a crash as the journal does
        if self.wandb is not None:
            self.wandb.log(numbers, histograms, line["step"])


def _is_per_head(value: list[Any]) -> bool:
    """Whether a list has a list for each layer instead of a number."""
    return bool(value) and isinstance(value[0], list)
