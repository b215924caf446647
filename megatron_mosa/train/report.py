"""The report at the end of a run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from megatron_mosa.errors import RunError
from megatron_mosa.metrics import NON_CAUSAL, plot_losses, read_journal, run_totals
from megatron_mosa.resilience import read_status
from megatron_mosa.utils import counted, decimals, tolerating


def report(directory: Path) -> None:
    """Plot loss.png; print what was done and how fast, and the last validation loss beside the unigram entropy."""
    lines = read_journal(directory / "metrics.jsonl")
    drawn = ""
    try:
        with tolerating("loss.png was not updated"):
            plot_losses(lines, directory / "loss.png", directory.name)
            drawn = ", loss.png"
    except RunError as error:
        print(f"No loss.png:      {error}")
    totals, status = run_totals(lines), read_status(directory) or {}
    restarts, skipped = status.get("starts", 1) - 1, status.get("skipped_steps", 0)
    since = " since the last one" if restarts else ""
    is_own = status.get("process") == os.getpid()  # a start of a complete run trains nothing
    wall = f", {time.time() - status['started']:.0f} s of wall-clock time since this start" if is_own else ""
    print(
        f"Trained:          {totals.steps:,} steps, {totals.tokens:,} tokens in {totals.duration} of steps: "
        f"{totals.tokens_per_second:,.0f} tokens/s, MFU {totals.mfu:.1%}{wall}; "
        f"{counted(restarts, 'restart')}, {counted(skipped, 'skipped step')}{since}"
    )
    folders = "".join(f", {name}/" for name in ("checkpoints", "tensorboard") if (directory / name).is_dir())
    print(f"Run directory:    {directory} (metrics.jsonl{drawn}{folders})")
    validation = next((line for line in reversed(lines) if "validation_loss" in line), None)
    if validation is not None:
        _report_validation(validation)


def _report_validation(line: dict[str, Any]) -> None:
    """Print a line of the journal, where None stands for what was not finite."""
    loss, perplexity, entropy = line["validation_loss"], line["validation_perplexity"], line["unigram_entropy"]
    label = "" if line["causal"] else f"   ({NON_CAUSAL})"
    if loss is None:
        print(f"Validation loss:  not finite: the training has diverged; try a lower optimizer.learning_rate{label}")
        return
    print(f"Validation loss:  {loss:.4f} nats per token, perplexity {decimals(perplexity)}{label}")
    gap = f"{abs(entropy - loss):.4f} {'below' if loss < entropy else 'above'}"
    print(f"Unigram entropy:  {entropy:.4f} nats per token of these samples: the model is {gap}")
