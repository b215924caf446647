"""Compute token losses of a model, with the whole sequence or only a prefix as input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mosa.data import ValidationSamples, validation_batches
from megatron_mosa.tools.evaluation.model import EvaluationModel

ProgressCallback = Callable[[int], object]
"""Called with the number of tokens just processed."""


class Estimate(NamedTuple):
    """A mean over samples, in nats."""

    mean: float
    error: float
    """Standard error of the mean; NaN for a single sample."""


def estimate(values: Tensor) -> Estimate:
    """Estimate the mean of values [N], one per sample."""
    values = values.double()
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")
    return Estimate(values.mean().item(), error)


def position_ranges(length: int) -> list[range]:
    """Return the ranges [0, 1), [1, 2), [2, 4), [4, 8) and so on; the last ends at ``length``."""
    edges = [0, 1]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return [range(start, end) for start, end in pairwise(edges)]


def batches(samples: ValidationSamples, tokens_at_once: int) -> Iterator[dict[str, Tensor]]:
    """Batch all samples, with at most ``tokens_at_once`` tokens per batch but at least one sample."""
    size = max(1, tokens_at_once // samples.sequence_length)
    return validation_batches(samples, micro_batch_size=size, data_parallel_rank=0, data_parallel_size=1)


def token_losses(
    model: EvaluationModel, samples: ValidationSamples, tokens_at_once: int, tick: ProgressCallback
) -> Tensor:
    """Return the losses of all tokens given whole samples, fp32 [N, T]."""
    found = []
    for batch in batches(samples, tokens_at_once):
        found.append(model.losses(batch["tokens"], batch["labels"], batch.get("document_starts")))
        tick(batch["tokens"].numel())
    return torch.cat(found)


def prefix_losses(
    model: EvaluationModel,
    samples: ValidationSamples,
    positions: Sequence[int],
    tokens_at_once: int,
    tick: ProgressCallback,
) -> Tensor:
    """Return the losses at chosen positions, given only the tokens up to each position, fp32 [N, positions]."""
    rows = []
    whole = [samples[number] for number in range(len(samples))]
    for position in positions:
        length = position + 1
        size = max(1, tokens_at_once // length)
        column = []
        for first in range(0, len(whole), size):
            part = whole[first : first + size]
            tokens, labels, *starts = (
                torch.stack([sample[key][:length] for sample in part])
                for key in ("tokens", "labels", "document_starts")
                if key in part[0]
            )
            column.append(model.losses(tokens, labels, *starts)[:, -1])
            tick(tokens.numel())
        rows.append(torch.cat(column))
    return torch.stack(rows, dim=1)


def chosen_positions(ranges: Sequence[range], each: int) -> list[int]:
    """Choose ``each`` evenly spaced positions per range, including its last one."""
    chosen = set()
    for part in ranges:
        count = min(each, len(part))
        chosen |= {part.start + len(part) * (i + 1) // count - 1 for i in range(count)}
    return sorted(chosen)
