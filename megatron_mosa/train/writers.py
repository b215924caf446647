"""Where lines go: the terminal, metrics.jsonl, TensorBoard and W&B. Only the main rank writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mosa.config import Config
from megatron_mosa.metrics import NON_CAUSAL, Journal, kind, scalars
from megatron_mosa.train.wandb_run import WandbRun


class Writers:
    """One training or validation line goes to every writer; on other ranks than the main one, nowhere."""

    def __init__(self, config: Config, run_directory: Path, *, is_main: bool, resumed_step: int) -> None:
        self.is_main = is_main
        self.last_step = config.train.steps
        if not is_main:
            return
        # Before the journal drops what will be run again: W&B has to be told of it.
        self.wandb = WandbRun(config, run_directory, resumed_step) if config.logging.wandb_project else None
        self.journal = Journal(run_directory / "metrics.jsonl", resumed_step)
        self.tensorboard: Any = None
        if config.logging.tensorboard:
            self._open_tensorboard(resumed_step)

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, which will be run again."""
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
        """One line for the reader at the terminal."""
        if self.is_main:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def training(self, line: dict[str, Any], seconds_left: float) -> None:
        """A training line of metrics.jsonl; ``seconds_left`` of steps at the present speed."""
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
        """A validation line of metrics.jsonl."""
        if not self.is_main:
            return
        self._record(line)
        label = "" if line["causal"] else f"  ({NON_CAUSAL})"
        self.note(
            f"step {line['step']}/{self.last_step}  validation loss {line['validation_loss']:.4f}  "
            f"perplexity {line['validation_perplexity']:.2f}{label}"
        )

    def close(self) -> None:
        """Flush what buffers."""
        if not self.is_main:
            return
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _record(self, line: dict[str, Any]) -> None:
        of_heads = {key: value for key, value in line.items() if isinstance(value, list) and _is_of_heads(value)}
        line = {key: value for key, value in line.items() if key not in of_heads}
        self.journal.write(line)  # without what is of every head: files would grow to gigabytes
        numbers = scalars(line)
        histograms = {
            f"{kind(line)}/{key}/layer_{number}": values
            for key, layers in of_heads.items()
            for number, values in enumerate(layers)
        }
        if self.tensorboard is not None:
            for name, number in numbers.items():
                self.tensorboard.add_scalar(name, number, line["step"])
            for name, values in histograms.items():
                self.tensorboard.add_histogram(name, np.array(values), line["step"])
            self.tensorboard.flush()  # so that a crash leaves there what it leaves in the journal
        if self.wandb is not None:
            self.wandb.log(numbers, histograms, line["step"])


def _is_of_heads(value: list[Any]) -> bool:
    """Whether a list has a list for each layer, not a number."""
    return bool(value) and isinstance(value[0], list)
