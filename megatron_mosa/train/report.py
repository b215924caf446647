"""The report at the end of a run."""

from __future__ import annotations

from pathlib import Path

from megatron_mosa.metrics import NON_CAUSAL, plot_losses, read_journal


def report(directory: Path) -> None:
    """Plot loss.png; print the run directory, the last validation loss and the unigram entropy of the same samples."""
    lines = read_journal(directory / "metrics.jsonl")
    plot_losses(lines, directory / "loss.png", directory.name)
    print(f"Run directory:    {directory} (metrics.jsonl, loss.png, checkpoints/, tensorboard/)")
    validation = next((line for line in reversed(lines) if "validation_loss" in line), None)
    if validation is not None:
        loss, entropy = validation["validation_loss"], validation["unigram_entropy"]
        gap = f"{abs(entropy - loss):.4f} {'below' if loss < entropy else 'above'}"
        label = "" if validation["causal"] else f"   ({NON_CAUSAL})"
        print(
            f"Validation loss:  {loss:.4f} nats per token, perplexity {validation['validation_perplexity']:.2f}{label}"
        )
        print(f"Unigram entropy:  {entropy:.4f} nats per token of these samples: the model is {gap}")
