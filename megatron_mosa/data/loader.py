"""Micro-batches of one data-parallel rank."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from megatron_mosa.data.samples import ValidationSamples

Batch = dict[str, Tensor]


def training_batches(
    samples: Dataset[Batch],
    *,
    consumed_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches for ever, from the first sample that has not been consumed.

    A step takes samples [consumed, consumed + global_batch_size) whatever the layout; each rank a contiguous part
    of them, micro-batch by micro-batch. The random state of this process is left alone.

    Args:
        samples: anything with samples at every number from 0, such as ``TrainingSamples``.
        num_workers: loader processes; 0 loads in this one.

    Returns:
        dictionaries of [micro_batch, T] tensors, in pinned memory where there is CUDA.

    Raises:
        ValueError: global_batch_size is not a multiple of micro_batch_size * data_parallel_size.
    """
    if global_batch_size % (micro_batch_size * data_parallel_size):
        raise ValueError(
            f"global_batch_size {global_batch_size} is not a multiple of {micro_batch_size} * {data_parallel_size}"
        )
    numbers = _RankBatches(
        consumed_samples, global_batch_size, micro_batch_size, data_parallel_rank, data_parallel_size
    )
    loader = DataLoader(
        samples,
        batch_sampler=numbers,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else the loader draws its workers' seed from the global one
    )
    return iter(loader)


def validation_batches(
    samples: ValidationSamples, *, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[Batch]:
    """Yield this rank's share of the samples once, as [micro_batch, T] tensors; the last batch may be short.

    Each sample is on exactly one rank. All ranks get the same number of batches of the same shapes, since the
    model communicates: missing samples are copies of the first with a loss_mask of zeros.
    """
    share = -(-len(samples) // data_parallel_size)
    first = data_parallel_rank * share
    for start in range(first, first + share, micro_batch_size):
        numbers = range(start, min(start + micro_batch_size, first + share))
        yield default_collate([samples[i] if i < len(samples) else _masked(samples[0]) for i in numbers])


@dataclass(frozen=True)
class _RankBatches:
    """The sample numbers of one rank, a list a micro-batch, without end."""

    consumed_samples: int
    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def __iter__(self) -> Iterator[list[int]]:
        share = self.global_batch_size // self.data_parallel_size
        first = self.consumed_samples + self.data_parallel_rank * share
        while True:
            for start in range(first, first + share, self.micro_batch_size):
                yield list(range(start, start + self.micro_batch_size))
            first += self.global_batch_size


def _masked(sample: Batch) -> Batch:
    return sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}


def _ignore_signals(worker: int) -> None:
    """Signals to the process group are for the trainer, which may want one more batch before it saves and ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
