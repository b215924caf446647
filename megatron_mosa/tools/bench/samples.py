"""Random tokens in place of a dataset."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset

from megatron_mosa.config import Config
from megatron_mosa.data import training_batches
from megatron_mosa.engine import Batch
from megatron_mosa.parallel import Layout

DOCUMENTS = 4  # in a sequence, on average


class RandomSamples(Dataset[Batch]):
    """Samples without end; the one of a number is the same on every rank."""

    def __init__(self, config: Config) -> None:
        self.length = config.data.sequence_length
        self.vocab_size = config.data.vocab_size
        self.marks_documents = config.model.attend_within_documents

    def __getitem__(self, number: int) -> Batch:
        """Return tokens, labels and loss mask, [T] each, and document starts if attention stays within documents."""
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, self.vocab_size, (self.length + 1,), generator=generator)
        sample = {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": torch.ones(self.length)}
        if self.marks_documents:
            begins = torch.rand(self.length, generator=generator) < DOCUMENTS / self.length
            begins[0] = True
            sample["document_starts"] = torch.where(begins, torch.arange(self.length), 0).cummax(dim=0).values
        return sample


def random_batches(config: Config, layout: Layout, num_workers: int = 0) -> Iterator[Batch]:
    """Yield this rank's micro-batches as in training, of random tokens."""
    return training_batches(
        RandomSamples(config),
        consumed_samples=0,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=layout.data_parallel_rank,
        data_parallel_size=layout.data_parallel_size,
        num_workers=num_workers,
    )
