"""The command ``mosa evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_mosa.errors import RunError, UserError

if TYPE_CHECKING:
    from megatron_mosa.checkpoint.opened import Opened
    from megatron_mosa.data import Mixture

_DTYPES = ("float32", "bfloat16")


def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint, a run directory (its newest), an exported model.")
    ],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="A built dataset; default: the one trained on.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Windows of the validation split.")] = 64,
    prefixes: Annotated[
        int, typer.Option("--prefixes", min=0, help="Positions in each range that are measured on prefixes alone.")
    ] = 2,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N,...", help="Multiples of the trained length; '' for none.")
    ] = "2,4",
    calibration_samples: Annotated[
        int,
        typer.Option(
            "--calibration-samples", min=1, help="Expert choice: windows of the training split for its thresholds."
        ),
    ] = 64,
    tokens_at_once: Annotated[int, typer.Option("--tokens-at-once", min=1, help="In one forward pass.")] = 8192,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; default: cuda where there is one.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16: what it is computed in.")] = "float32",
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Write all numbers as JSON.")] = None,
) -> None:
    """Measure a model with and without a view of the future: losses, leak, flips, by position and by length.

    A model that looks ahead (expert choice) is measured as it was trained, labelled NON-CAUSAL, and as it could be
    decoded: by thresholds that are calibrated on the training split.
    """
    multiples = _multiples(lengths)
    if dtype not in _DTYPES:
        raise UserError(f"--dtype={dtype} is not supported; expected {', '.join(_DTYPES)}")
    import torch
    from rich.console import Console

    from megatron_mosa.checkpoint.manifest import naming_damage
    from megatron_mosa.checkpoint.opened import open_model
    from megatron_mosa.data.shards import progress
    from megatron_mosa.evaluation.evaluate import Settings
    from megatron_mosa.evaluation.evaluate import evaluate as measure
    from megatron_mosa.evaluation.report import tell

    with naming_damage(path):
        model = open_model(path)
    mixture = _dataset(model, data)
    settings = Settings(
        samples, prefixes, multiples, calibration_samples, tokens_at_once, _device(device), getattr(torch, dtype)
    )
    with progress(None, "evaluating", unit="token") as bar:
        found = {"model": str(model.path), "dtype": dtype} | measure(model, mixture, settings, bar.update)
    tell(found, Console())
    if output is not None:
        _write(found, output)


def _multiples(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) >= 2 for word in words):
        raise UserError(
            f"--lengths={text} is not supported; expected numbers from 2 on, with commas between, such as 2,4"
        )
    return tuple(int(word) for word in words)


def _device(name: str) -> Any:
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        there = "cpu, cuda" if torch.cuda.is_available() else "cpu (torch sees no GPU)"
        raise UserError(f"--device={name} is not supported; expected {there}")
    return torch.device(name)


def _dataset(model: Opened, path: Path | None) -> Mixture:
    """The dataset that is asked for, or that the model was trained on."""
    from megatron_mosa.checkpoint.dataset import open_dataset
    from megatron_mosa.checkpoint.opened import Source
    from megatron_mosa.config.schema import DataSection
    from megatron_mosa.data import open_mixture

    if isinstance(model, Source):
        return open_dataset(model.metadata, path)
    if path is None:
        raise UserError(f"'{model.path}' does not say where its data lies; give --data PATH, a built dataset")
    mixture = open_mixture(DataSection(path=str(path)))
    if mixture.manifest.vocab_size > model.vocab_rows:  # such a folder does not name its tokenizer
        raise UserError(
            f"--data={path} has a vocabulary of {mixture.manifest.vocab_size}, '{model.path}' one of "
            f"{model.vocab_rows}; give the dataset of its tokenizer"
        )
    return mixture


def _write(found: dict[str, Any], output: Path) -> None:
    try:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"--output={output} cannot be written: {error.strerror}") from None
    print(f"written: {output}")
