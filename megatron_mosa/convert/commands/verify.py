"""Compare two checkpoints of any kinds: weights, optimizer moments and logits."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mosa.checkpoint import damage_as_run_error
from megatron_mosa.convert.formats.mosa import CheckpointReader
from megatron_mosa.convert.logits import fixed_batch, largest_divergence, megatron_logits
from megatron_mosa.convert.model_config import to_transformers
from megatron_mosa.convert.model_reader import ModelReader, open_model
from megatron_mosa.convert.weights import CALIBRATED, Weight, lacks_thresholds
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.utils import counted

_WEIGHT = "model."  # prefix of weight keys, but not of moments


class Difference(NamedTuple):
    """Difference between two versions of one tensor."""

    relative: float
    """Norm of the difference divided by the norm of the first tensor, both in fp64; infinite if either has a NaN."""

    name: str


def verify(first: Path, second: Path, *, tolerance: float = 0.0, compares_logits: bool = True) -> None:
    """Compare all weights, Adam's moments if both have them, and the logits of a fixed batch; print the result.

    Args:
        first: a checkpoint, a run directory (its newest checkpoint), a Hugging Face folder or a torch_dist checkpoint.
        second: likewise.
        tolerance: the largest permitted relative difference of a tensor; 0: bitwise equality. Logits of bitwise equal
            weights must always be equal.
        compares_logits: also build both models, one after the other, in fp32 on the CPU, and compare their logits.

    Raises:
        UserError: a model does not exist, or the tolerance is negative.
        RunError: the models differ (the message names the tensor that differs most), or one of them is damaged.
    """
    if not tolerance >= 0:
        raise UserError(f"--tolerance must be at least 0 (bitwise equality), got {tolerance}")
    models = []
    for path in (first, second):
        with damage_as_run_error(path):
            models.append(open_model(path))
    ours, theirs = models
    _check_shapes(ours, theirs)
    _check_thresholds(ours, theirs)
    differences, compared = _compare(ours, theirs)
    _report(max(differences), compared, tolerance)
    if compares_logits:
        has_equal_weights = not any(relative for relative, key in differences if key.startswith(_WEIGHT))
        _compare_logits(ours, theirs, must_be_equal=has_equal_weights)


def _check_shapes(ours: ModelReader, theirs: ModelReader) -> None:
    shapes = [{weight.name: weight.shape for weight in model.weights} for model in (ours, theirs)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            raise RunError(
                f"the models differ: {name} is {shapes[0].get(name, 'missing')} in '{ours.path}', "
                f"{shapes[1].get(name, 'missing')} in '{theirs.path}'"
            )


def _check_thresholds(ours: ModelReader, theirs: ModelReader) -> None:
    """Raise an error if only one model has thresholds to select by: without, its heads select by expert choice."""
    without = []
    for model in (ours, theirs):
        with damage_as_run_error(model.path):
            if lacks_thresholds(model.weights, model.read):
                without.append(model.path)
    if len(without) == 1:
        raise RunError(
            f"the models differ: no optimizer step has set the thresholds of '{without[0]}', so its heads still select "
            "by expert choice"
        )


def _compare(ours: ModelReader, theirs: ModelReader) -> tuple[list[Difference], str]:
    """Return the difference of each tensor, and a description of what was compared."""
    from megatron_mosa.utils import progress

    weights = [f"{_WEIGHT}{weight.name}" for weight in ours.weights if _has(ours, weight) and _has(theirs, weight)]
    moments = sorted(_moments(ours) & _moments(theirs))
    sizes = {weight.name: torch.Size(weight.shape).numel() for weight in ours.weights}
    found = []
    keys = [*weights, *moments]
    with progress(4 * sum(sizes[key.partition(".")[2]] for key in keys), "comparing") as bar:
        for key in keys:
            tensor = _read(ours, key)
            found.append(Difference(_relative(tensor, _read(theirs, key)), key))
            bar.update(tensor.nbytes)
    return found, counted(len(weights), "weight") + (f" and {counted(len(moments), 'moment')}" if moments else "")


def _has(model: ModelReader, weight: Weight) -> bool:
    """Return whether a model has a weight from training; an import makes up what transformers has no place for."""
    if weight.parts:
        return True
    if not isinstance(model, CheckpointReader):
        return False
    return not bool((_read(model, f"{_WEIGHT}{weight.name}") == CALIBRATED).all())


def _moments(model: ModelReader) -> set[str]:
    return (
        {key for key in model.state.tensors if not key.startswith(_WEIGHT)}
        if isinstance(model, CheckpointReader)
        else set()
    )


def _read(model: ModelReader, key: str) -> Tensor:
    with damage_as_run_error(model.path):
        if isinstance(model, CheckpointReader):
            return model.state.read(key)
        return model.read(key.removeprefix(_WEIGHT))


def _relative(first: Tensor, second: Tensor) -> float:
    if torch.equal(first, second):
        return 0.0
    difference = ((first.double() - second.double()).norm() / first.double().norm().clamp(min=1e-300)).item()
    return difference if difference > 0 else float("inf")  # NaN, or zeros of different sign


def _report(worst: Difference, compared: str, tolerance: float) -> None:
    if worst.relative > tolerance:
        raise RunError(
            f"the models differ: of {compared}, {worst.name} differs most, by {worst.relative:.1e} of its norm "
            f"(--tolerance: {tolerance:g})"
        )
    print(f"{compared}: " + ("bitwise equal" if worst.relative == 0 else f"equal within {worst.relative:.1e}"))


def _compare_logits(ours: ModelReader, theirs: ModelReader, *, must_be_equal: bool) -> None:
    tokens = fixed_batch(ours.config, ours.vocab_rows)
    expected, found = (megatron_logits(model.config, model.vocab_rows, model.read, tokens) for model in (ours, theirs))
    divergence = largest_divergence(expected, found)
    print(f"logits of {tokens.numel()} fixed tokens: largest KL divergence {divergence:.1e} nats")
    if must_be_equal and not torch.equal(expected, found):
        first, second = (to_transformers(model.config, model.vocab_rows) for model in (ours, theirs))
        differing = [f"{key} ({first[key]} and {second[key]})" for key in first if first[key] != second[key]]
        raise RunError(
            f"the models differ: their weights are equal, but their logits are not (KL divergence {divergence:.1e} "
            f"nats); what differs in their configurations: {', '.join(differing) or 'nothing; please report this'}"
        )
