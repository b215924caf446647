"""The loss curves of a run, loss.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mosa.metrics.pictures import load_pyplot, save_figure


def plot_losses(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot training and validation loss over tokens, and the unigram entropy if it is known.

    Args:
        lines: as returned by ``read_journal``.
        path: PNG file to write.
        title: name of the run.

    Raises:
        RunError: matplotlib is not installed.
    """
    plt = load_pyplot()
    training = [(line["tokens"], line["loss"]) for line in lines if line.get("loss") is not None]
    validation = [
        (line["tokens"], line["validation_loss"]) for line in lines if line.get("validation_loss") is not None
    ]
    entropies = [line["unigram_entropy"] for line in lines if "unigram_entropy" in line]
    training_causal, validation_causal = (
        {line.get("causal", True) for line in lines if line.get(key) is not None} for key in ("loss", "validation_loss")
    )

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if training:
        axes.plot(*zip(*training, strict=True), label="training" + causality_suffix(training_causal), linewidth=1)
    if validation:
        axes.plot(
            *zip(*validation, strict=True),
            label="validation" + causality_suffix(validation_causal),
            marker="o",
            markersize=3,
        )
    if entropies:
        axes.axhline(entropies[-1], color="gray", linestyle="--", linewidth=1, label="unigram entropy of validation")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path, dpi=120)


def causality_suffix(causal: set[bool]) -> str:
    """Return the suffix of a curve's label, from the causality of its points."""
    return "" if causal <= {True} else ", NON-CAUSAL" if causal == {False} else ", NON-CAUSAL in the warm-up"
