"""Implement the command ``mosa evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_mosa.entry import check_output
from megatron_mosa.errors import UserError
from megatron_mosa.options import MOST_SAMPLES, bounds
from megatron_mosa.utils import finite, table_console, write_atomically

if TYPE_CHECKING:
    from megatron_mosa.convert import ModelReader
    from megatron_mosa.data import Mixture

_DTYPES = ("float32", "bfloat16")


def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A checkpoint, a run directory (its newest checkpoint), or an exported model."
        ),
    ],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="A built dataset; default: the training dataset.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", callback=bounds(2, MOST_SAMPLES), help="Number of validation windows.")
    ] = 64,
    prefixes: Annotated[
        int,
        typer.Option(
            "--prefixes", callback=bounds(0, 100_000), help="Positions per range for the prefix-only loss; 0: none."
        ),
    ] = 2,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N,...", help="Multiples of the training length; '' for none.")
    ] = "2,4",
    calibration_samples: Annotated[
        int,
        typer.Option(
            "--calibration-samples",
            callback=bounds(1, MOST_SAMPLES),
            help="Expert choice: training windows to calibrate thresholds on.",
        ),
    ] = 64,
    tokens_at_once: Annotated[
        int, typer.Option("--tokens-at-once", callback=bounds(1, 2**26), help="Tokens per forward pass.")
    ] = 8192,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; default: cuda if available.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="Compute dtype: float32 or bfloat16.")] = "float32",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Also write all results as JSON.")
    ] = None,
) -> None:
    """Measure a model with and without access to future tokens: losses, leak, flip rate, by position and length.

    A model that looks ahead (expert choice) is measured as trained, labeled NON-CAUSAL, and as it can be decoded: with
    thresholds calibrated on the training split. Models with Routing heads are only measured as trained.
    """
    multiples = _multiples(lengths)
    if dtype not in _DTYPES:
        raise UserError(f"--dtype must be {' or '.join(_DTYPES)}, got {dtype}")
    check_output("--output", output)
    from megatron_mosa.convert import find_model

    find_model(path)  # what does not exist is reported before the imports, which take seconds
    import torch

    from megatron_mosa.checkpoint import damage_as_run_error
    from megatron_mosa.convert import open_model
    from megatron_mosa.tools.evaluation.evaluate import Settings
    from megatron_mosa.tools.evaluation.evaluate import evaluate as measure
    from megatron_mosa.tools.evaluation.report import print_report
    from megatron_mosa.utils import progress

    with damage_as_run_error(path):
        model = open_model(path)
    mixture = _dataset(model, data)
    settings = Settings(
        samples, prefixes, multiples, calibration_samples, tokens_at_once, _device(device), getattr(torch, dtype)
    )
    with progress(None, "evaluating", unit="token") as bar:
        found = {"model": str(model.path), "dtype": dtype} | measure(model, mixture, settings, bar.update, bar.reset)
    print_report(found, table_console())
    if output is not None:
        _write(found, output)


def _multiples(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isascii() and word.isdecimal() and len(word) <= 4 and int(word) >= 2 for word in words):
        raise UserError(
            f"--lengths must be comma-separated integers of at least 2 and below 10000, such as 2,4, got {text}"
        )
    return tuple(int(word) for word in words)


def _device(name: str) -> Any:
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        available = "cpu or cuda" if torch.cuda.is_available() else "cpu (torch finds no GPU)"
        raise UserError(f"--device must be {available}, got {name}")
    return torch.device(name)


def _dataset(model: ModelReader, path: Path | None) -> Mixture:
    """Open the given dataset, or the one that the model was trained on."""
    from megatron_mosa.convert import CheckpointReader, open_dataset, open_given_dataset

    if isinstance(model, CheckpointReader):
        return open_dataset(model.metadata, path)
    if path is None:
        raise UserError(f"'{model.path}' does not record its dataset; pass a built dataset: --data PATH")
    mixture = open_given_dataset(path)
    if mixture.manifest.vocab_size > model.vocab_rows:  # an exported model does not record its tokenizer's hash
        raise UserError(
            f"--data={path} has a vocabulary of {mixture.manifest.vocab_size}, but '{model.path}' only "
            f"{model.vocab_rows} embedding rows; pass a dataset built with the model's tokenizer"
        )
    return mixture


def _write(found: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(finite(found), indent=1, allow_nan=False) + "\n")
    print(f"Wrote {output}")
