"""Training and validation samples from built datasets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, distributed

from megatron_mosa.data.index import PassIndex
from megatron_mosa.data.integrity import check_header, open_indexed
from megatron_mosa.data.mixture import Mixture
from megatron_mosa.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset


class TrainingSamples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The endless, shuffled sequence of training samples of one seed.

    Sample i belongs to pass i // index_samples. A pass is one mcore GPTDataset of exactly ``index_samples`` samples, or
    a BlendedDataset of several, shuffled with seed + pass. mcore's order depends on the number of samples requested,
    so that number is fixed, and a longer run only adds passes. A pass smaller than the training split draws a random
    part of it; a larger one repeats the split.

    Args:
        mixture: from ``open_mixture``.
        sequence_length: T, tokens per sample.
        index_samples: samples per pass.
        seed: seed of the order, 0 to 2**32 - 1.
        index_path: folder of the shuffled indices; None: index_cache in the (first) dataset.
        mark_documents: include ``document_starts`` in every sample.

    Raises:
        UserError: a training split is shorter than T + 1 tokens.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        sequence_length: int,
        index_samples: int,
        seed: int,
        index_path: str | Path | None = None,
        mark_documents: bool = False,
    ) -> None:
        self.mixture = mixture
        self.mark_documents = mark_documents
        self._index = PassIndex(
            mixture, sequence_length, index_samples, seed, Path(index_path).expanduser() if index_path else None
        )
        self._passes: dict[int, Any] = {}
        check_lengths(mixture, "train", sequence_length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return sample ``index``, 0 or higher: tokens and labels int64 [T], loss_mask float32 [T].

        labels[t] is the token that follows tokens[t]. With ``mark_documents`` also document_starts, int64 [T].

        Raises:
            UserError: ``prepare`` has not built the sample's pass, in a distributed run.
        """
        if index < 0:
            raise IndexError(f"sample {index} does not exist: samples are numbered from 0")
        number, offset = divmod(index, self._index.index_samples)
        if number not in self._passes:
            if not self._index.is_built(number):
                if distributed.is_initialized():
                    raise UserError(self._missing_index(number))
                self._index.build(number)
            self._passes[number] = self._index.open(number)
        sample = self._passes[number][offset]
        item = {key: sample[key] for key in ("tokens", "labels", "loss_mask")}
        if self.mark_documents:
            item["document_starts"] = document_starts(item["tokens"], self.mixture.manifest.end_of_document_id)
        return item

    def prepare(self, first: int, last: int) -> list[Path]:
        """Build the index of every pass that contains samples first to last; collective if torch.distributed runs.

        Global rank 0 builds and verifies the indices, then all ranks check that they see them. Call it before starting
        loaders, whose processes cannot wait for each other.

        Returns:
            the folders of these passes.

        Raises:
            UserError: on every rank, if rank 0 cannot write or any rank does not see an index.
        """
        index = self._index
        numbers = range(first // index.index_samples, last // index.index_samples + 1)
        failure = None
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            try:
                for number in numbers:
                    if index.is_built(number):
                        index.check(number)
                    else:
                        index.build(number)
            except UserError as error:
                failure = str(error)
        failure = _first_failure(failure)
        if failure is None:
            missing = next((number for number in numbers if not index.is_built(number)), None)
            failure = _first_failure(None if missing is None else self._missing_index(missing))
        if failure is not None:
            raise UserError(failure)
        return [index.path(number) for number in numbers]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_passes": {}}  # each loader process maps the files itself

    def _missing_index(self, number: int) -> str:
        return (
            f"the sample index of pass {number} is missing in {self._index.path(number)}; every node must see it: set "
            "data.index_path to a shared folder, or run mosa data index on every node"
        )


class ValidationSamples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The first windows of T + 1 tokens of a split, in file order, without overlap or shuffling.

    Of several datasets each contributes its share of the windows, one dataset after the other. If a split is too short
    for its share, there are fewer windows in total, in the same shares.

    Args:
        mixture: from ``open_mixture``.
        sequence_length: T, tokens per sample.
        num_samples: maximum number of windows; ``len`` gives the actual number.
        mark_documents: include ``document_starts`` in every sample.
        split: "validation", or "train" for purposes other than measuring the model.

    Raises:
        UserError: a split is shorter than T + 1 tokens.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        sequence_length: int,
        num_samples: int,
        mark_documents: bool = False,
        split: str = "validation",
    ) -> None:
        self.mixture = mixture
        self.mark_documents = mark_documents
        self.sequence_length = sequence_length
        check_lengths(mixture, split, sequence_length)
        available = [m.splits[split]["tokens"] // (sequence_length + 1) for m in mixture.manifests]
        counts = _apportion(mixture.weights, available, num_samples)
        self._prefixes = [path / split for path in mixture.paths]
        for prefix in self._prefixes:
            check_header(prefix)
        self._windows = [(number, window) for number, count in enumerate(counts) for window in range(count)]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return window ``index`` in the form of a ``TrainingSamples`` sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"validation sample {index} does not exist: there are {len(self)}")
        window = torch.from_numpy(self._window(index))  # [T + 1]
        tokens, labels = window[:-1].clone(), window[1:].clone()
        item = {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(len(tokens))}
        if self.mark_documents:
            item["document_starts"] = document_starts(tokens, self.mixture.manifest.end_of_document_id)
        return item

    def unigram_entropy(self) -> float:
        """Return the entropy of the label frequencies in nats: the loss of a model that knows only the frequencies."""
        counts = np.zeros(self.mixture.manifest.vocab_size, dtype=np.int64)  # [vocabulary]
        for index in range(len(self)):
            counts += np.bincount(self._window(index)[1:], minlength=len(counts))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def document_lengths(self) -> list[list[int]]:
        """Return the number of tokens of each document in each sample; nothing if documents are not marked."""
        samples = (self[index] for index in range(len(self) if self.mark_documents else 0))
        return [lengths_of_documents(sample["document_starts"]) for sample in samples]

    @cached_property
    def _indexed(self) -> list[IndexedDataset]:
        """The token files, opened at their first use: the check of a start reads no token."""
        return [open_indexed(prefix) for prefix in self._prefixes]

    def _window(self, index: int) -> np.ndarray:
        """Return tokens int64 [T + 1]. Documents are stored without gaps, so a window is one read."""
        number, window = self._windows[index]
        indexed, length = self._indexed[number], self.sequence_length + 1
        dtype = indexed.index.dtype
        return indexed.bin_reader.read(dtype, length, window * length * np.dtype(dtype).itemsize).astype(np.int64)


def document_starts(tokens: Tensor, end_of_document_id: int) -> Tensor:
    """Return the position where each token's document begins in a packed sequence, int64 [T].

    A document ends with its end-of-document token. The first token of a sequence counts as the beginning of a document,
    even if the document began in an earlier sequence.
    """
    is_first = torch.cat((torch.ones(1, dtype=torch.bool), tokens[:-1] == end_of_document_id))
    return torch.where(is_first, torch.arange(len(tokens)), 0).cummax(0).values


def lengths_of_documents(starts: Tensor) -> list[int]:
    """Return the number of tokens of each document in a sequence, from what ``document_starts`` returns."""
    return starts.unique_consecutive(return_counts=True)[1].tolist()


def _apportion(weights: Sequence[float], available: Sequence[int], requested: int) -> list[int]:
    """Divide ``requested`` by the weights, with the largest-remainder method; fewer in total if one has too few."""
    limits = (math.floor(count / weight + 1e-9) for count, weight in zip(available, weights, strict=True))
    total = min(requested, *limits)
    exact = [weight * total for weight in weights]
    counts = [math.floor(share + 1e-9) for share in exact]
    order = sorted(range(len(counts)), key=lambda number: counts[number] - exact[number])
    for number in order[: total - sum(counts)]:
        counts[number] += 1
    return counts


def _first_failure(failure: str | None) -> str | None:
    """Return the failure of the first rank that has one, on every rank."""
    if not distributed.is_initialized():
        return failure
    failures: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(failures, failure)
    return next(filter(None, failures), None)


def check_lengths(mixture: Mixture, split: str, sequence_length: int) -> None:
    """Raise a UserError if a dataset's split is shorter than T + 1 tokens."""
    for path, manifest in zip(mixture.paths, mixture.manifests, strict=True):
        tokens = manifest.splits[split]["tokens"]
        if tokens < sequence_length + 1:
            fix = "add sources" + (" or raise data.validation_fraction" if split == "validation" else "")
            raise UserError(
                f"data.sequence_length must be at most {tokens - 1}, one less than the tokens in the {split} split of "
                f"{path}, got {sequence_length}; shorten it, or {fix} and rebuild the dataset"
            )
