"""Load the micro-batches of one data-parallel rank."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
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
    """Yield this rank's micro-batches, starting with the first sample that has not been consumed.

    In every layout a step takes samples [consumed, consumed + global_batch_size), and each rank a contiguous part of
    them, micro-batch by micro-batch. The random state of this process does not change.

    Args:
        samples: a dataset with samples numbered from 0, such as ``TrainingSamples``.
        consumed_samples: number of samples that earlier steps have taken, over all ranks.
        global_batch_size: samples per step, over all ranks.
        micro_batch_size: samples per micro-batch.
        data_parallel_rank: this rank.
        data_parallel_size: number of ranks.
        num_workers: loader processes; 0: load in this process. With CUDA, all micro-batches of a step are needed at
            once, so the processes prefetch a whole step.
        end: stop before this sample, so that loaders do not read beyond the end of a run; None: never stop.

    Returns:
        dictionaries of [micro_batch, T] tensors, in pinned memory if CUDA is available.

    Raises:
        ValueError: global_batch_size is not a multiple of micro_batch_size * data_parallel_size.
    """
    if global_batch_size % (micro_batch_size * data_parallel_size):
        raise ValueError(
            f"global_batch_size must be a multiple of micro_batch_size * data_parallel_size = {micro_batch_size} * "
            f"{data_parallel_size}, got {global_batch_size}"
        )
    share = global_batch_size // data_parallel_size
    steps = (
        count(consumed_samples, global_batch_size) if end is None else range(consumed_samples, end, global_batch_size)
    )
    offsets = range(data_parallel_rank * share, (data_parallel_rank + 1) * share, micro_batch_size)
    has_cuda = torch.cuda.is_available()
    prefetch = 2  # batches per loader process, torch's default
    if has_cuda and num_workers:
        prefetch = max(prefetch, math.ceil(len(offsets) / num_workers))
    loader = DataLoader(
        samples,
        batch_sampler=(list(range(step + i, step + i + micro_batch_size)) for step in steps for i in offsets),
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        pin_memory=has_cuda,
        worker_init_fn=_ignore_job_signals,
        generator=torch.Generator(),  # otherwise the workers' seed would be drawn from the global one
    )
    return iter(loader) if has_cuda or not num_workers else map(_out_of_shared_memory, loader)


def validation_batches(
    samples: ValidationSamples, *, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[Batch]:
    """Yield this rank's share of the samples once, as [micro_batch, T] tensors; the last batch may be smaller.

    Each sample is on exactly one rank. All ranks get the same number of batches of the same shapes, because the model
    communicates: the last ranks are padded with copies of the first sample whose loss_mask is zero.
    """
    share = -(-len(samples) // data_parallel_size)
    first = data_parallel_rank * share
    for start in range(first, first + share, micro_batch_size):
        numbers = range(start, min(start + micro_batch_size, first + share))
        yield default_collate([samples[i] if i < len(samples) else _masked(samples[0]) for i in numbers])


def _out_of_shared_memory(batch: Batch) -> Batch:
    """Copy a batch out of the memory shared with a loader process, where each tensor holds a file descriptor."""
    return {name: tensor.clone() for name, tensor in batch.items()}


def _masked(sample: Batch) -> Batch:
    return sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}


def _ignore_job_signals(worker: int) -> None:
    """Ignore signals sent to the whole job: the trainer may need another batch before it saves and exits.

    SIGTERM cannot simply be ignored, because the trainer sends it to its loader processes on exit and waits for them.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler inherited from the trainer
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_when_trainer_asks, daemon=True).start()


def _exit_when_trainer_asks() -> None:
    trainer = parent_process()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != (trainer.pid if trainer else None):
        pass
    os._exit(0)
