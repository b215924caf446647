"""Where lines go: the terminal, metrics.jsonl and TensorBoard. Only the main rank writes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron_mosa.metrics import Journal

NON_CAUSAL = "non-causal: expert choice selects with the whole sequence in view"


class Writers:
    """One training or validation line goes to every writer; on other ranks than the main one, nowhere."""

    def __init__(
        self, run_directory: Path, *, is_main: bool, last_step: int, resumed_step: int, tensorboard: bool
    ) -> None:
        self.is_main = is_main
        self.last_step = last_step
        if not is_main:
            return
        self.journal = Journal(run_directory / "metrics.jsonl", resumed_step)
        self.tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.tensorboard = SummaryWriter(run_directory / "tensorboard", purge_step=resumed_step + 1)

    def note(self, text: str) -> None:
        """One line for the reader at the terminal."""
        if self.is_main:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def training(self, line: dict[str, Any], seconds_left: float) -> None:
        """A training line of metrics.jsonl; ``seconds_left`` of steps at the present speed."""
        if not self.is_main:
            return
        self._record("train", line)
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
        self._record("validation", line)
        label = "" if line["causal"] else f"  ({NON_CAUSAL})"
        self.note(
            f"step {line['step']}/{self.last_step}  validation loss {line['validation_loss']:.4f}  "
            f"perplexity {line['validation_perplexity']:.2f}{label}"
        )

    def close(self) -> None:
        """Flush what buffers."""
        if self.is_main and self.tensorboard is not None:
            self.tensorboard.close()

    def _record(self, kind: str, line: dict[str, Any]) -> None:
        self.journal.write(line)
        if self.tensorboard is None:
            return
        for key, value in line.items():
            if key in ("step", "causal"):
                continue
            values = {f"{key}/layer_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
            for name, scalar in values.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", scalar, line["step"])
