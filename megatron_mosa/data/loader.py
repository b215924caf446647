"""Micro-batches of one data-parallel rank."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing import parent_process

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
    end: int | None = None,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches from the first sample that has not been consumed.

    A step takes samples [consumed, consumed + global_batch_size) whatever the layout; each rank a contiguous part
    of them, micro-batch by micro-batch. The random state of this process is left alone.

    Args:
        samples: anything with samples at every number from 0, such as ``TrainingSamples``.
        num_workers: loader processes; 0 loads in this one. A step needs all its micro-batches at once, so where there
            is CUDA the processes get those of the next step ready during a step.
        end: number of the sample to stop before, so that no loader reads ahead of a run's end; None: for ever.

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
        consumed_samples, global_batch_size, micro_batch_size, data_parallel_rank, data_parallel_size, end
    )
    has_cuda = torch.cuda.is_available()
    ahead = 2  # batches that each loader process gets ready, torch's default
    if has_cuda and num_workers:
        micro_batches = global_batch_size // (micro_batch_size * data_parallel_size)
        ahead = max(ahead, math.ceil(micro_batches / num_workers))
    loader = DataLoader(
        samples,
        batch_sampler=numbers,
        num_workers=num_workers,
        prefetch_factor=ahead if num_workers else None,
        pin_memory=has_cuda,
        worker_init_fn=_obey_only_the_trainer,
        generator=torch.Generator(),  # else the loader draws its workers' seed from the global one
    )
    return iter(loader) if has_cuda or not num_workers else map(_own_copy, loader)


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
    """The sample numbers of one rank, a list a micro-batch."""

    consumed_samples: int
    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    end: int | None

    def __iter__(self) -> Iterator[list[int]]:
        share = self.global_batch_size // self.data_parallel_size
        for batch in count(self.consumed_samples, self.global_batch_size):
            if self.end is not None and batch >= self.end:
                return
            first = batch + self.data_parallel_rank * share
            for start in range(first, first + share, self.micro_batch_size):
                yield list(range(start, start + self.micro_batch_size))


def _own_copy(batch: Batch) -> Batch:
    """Out of the memory shared with a loader process: each tensor there holds a file descriptor."""
    return {name: tensor.clone() for name, tensor in batch.items()}


def _masked(sample: Batch) -> Batch:
    return sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}


def _obey_only_the_trainer(worker: int) -> None:
    """Leave signals sent to the whole job to the trainer, which may want another batch before it saves and ends.

    SIGTERM cannot just be ignored: it is how the trainer's own exit stops a loader process, and then waits for it.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler inherited from the trainer
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    trainer = parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (trainer.pid if trainer else None):
        pass
    os._exit(0)
