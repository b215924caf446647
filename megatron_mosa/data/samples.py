"""Training and validation samples out of a built dataset."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor, distributed

from megatron_mosa.data.build import INDEX_CACHE
from megatron_mosa.data.manifest import Manifest, read_manifest
from megatron_mosa.errors import UserError

# mcore masks the loss of the pad token and replaces it by token 0. Documents are packed, nothing is padded, so the
# id must be one that no text has. It must not be equal to the end-of-document id either: mcore would then change it.
_NO_PADDING = -1


class TrainingSamples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The endless, shuffled sequence of training samples of one seed.

    Sample i belongs to pass i // index_samples. A pass is one mcore GPTDataset of exactly ``index_samples``
    samples, shuffled by seed + pass: mcore's order depends on the number of samples asked for, so that number is
    pinned, and a longer run only adds passes after those it has seen. A pass smaller than the training split
    draws a random part of it; a larger one goes over the split several times.

    The shuffled indices are kept below ``path``/index_cache, which every node must share.

    Args:
        path: a folder written by ``build_dataset``.
        sequence_length: T, tokens a sample.
        index_samples: samples a pass.
        seed: of the order, 0 to 2**32 - 1.

    Raises:
        UserError: the dataset is missing or damaged, or its training split is shorter than T + 1 tokens.
    """

    def __init__(self, path: str | Path, *, sequence_length: int, index_samples: int, seed: int) -> None:
        self.manifest = read_manifest(path)
        self.sequence_length = sequence_length
        self.index_samples = index_samples
        self.seed = seed
        self._path = Path(path)
        self._passes: dict[int, GPTDataset] = {}
        _check_length(self.manifest, "train", path, sequence_length)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return sample ``index`` (any number from 0): tokens and labels int64 [T], loss_mask float32 [T].

        labels[t] is the token that follows tokens[t].

        Raises:
            UserError: in a distributed run, a pass that ``prepare`` has not built.
        """
        if index < 0:
            raise IndexError(f"sample {index}: samples are counted from 0")
        number, offset = divmod(index, self.index_samples)
        if number not in self._passes:
            if not self._folder(number).is_dir():
                if distributed.is_initialized():
                    raise UserError(
                        f"the sample index of pass {number} is missing in {self._folder(number)}; the trainer builds "
                        "it before loading (TrainingSamples.prepare), and every node must see the folder"
                    )
                self._build(number)
            self._passes[number] = self._dataset(number, self._folder(number))
        sample = self._passes[number][offset]
        return {key: sample[key] for key in ("tokens", "labels", "loss_mask")}

    def prepare(self, first: int, last: int) -> None:
        """Build the index of every pass that samples first to last touch; collective when torch.distributed runs.

        Global rank 0 writes, the others wait. Call it before loaders start: in their processes nobody can wait.

        Raises:
            UserError: on every rank, when rank 0 cannot write below data.path.
        """
        failure: list[str | None] = [None]
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            try:
                for number in range(first // self.index_samples, last // self.index_samples + 1):
                    if not self._folder(number).is_dir():
                        self._build(number)
            except UserError as error:
                failure = [str(error)]
        if distributed.is_initialized():
            distributed.broadcast_object_list(failure, src=0)  # a barrier that carries rank 0's failure
        if failure[0] is not None:
            raise UserError(failure[0])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_passes": {}}  # a started loader process maps the files itself

    def _folder(self, number: int) -> Path:
        """The index of one pass: everything that the order depends on is in the name."""
        name = f"{self.manifest.fingerprint[:16]}-t{self.sequence_length}-n{self.index_samples}-s{self.seed}-p{number}"
        return self._path / INDEX_CACHE / name

    def _build(self, number: int) -> None:
        """Write the index beside its place and rename it: no reader ever meets half of it."""
        cache = self._path / INDEX_CACHE
        try:
            cache.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-", ignore_cleanup_errors=True) as partial:
                building = Path(partial) / "index"
                self._dataset(number, building)
                try:
                    os.rename(building, self._folder(number))
                except OSError:
                    if not self._folder(number).is_dir():  # else another loader process was first, with the same bytes
                        raise
        except OSError as error:
            free = shutil.disk_usage(self._path).free >> 20
            raise UserError(
                f"cannot write the sample index to {cache}: {error.strerror} ({free} MB free); the dataset folder must "
                "be writable when a run starts: change its permissions, or copy it and set data.path to the copy"
            ) from error

    def _dataset(self, number: int, cache: Path) -> GPTDataset:
        """One pass. mcore reads its index from ``cache`` or, if that is empty, builds and writes it there."""
        config = GPTDatasetConfig(
            random_seed=(self.seed + number) % 2**32,
            sequence_length=self.sequence_length,
            path_to_cache=str(cache),
            tokenizer=_tokenizer_facts(self.manifest),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        indexed = IndexedDataset(str(self._path / "train"))
        documents = np.arange(len(indexed), dtype=np.int32)
        # The second argument only enters the cache key; a path there would tie the cache to where the folder lies.
        return GPTDataset(indexed, self.manifest.fingerprint, documents, self.index_samples, Split.train, config)


class ValidationSamples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The first windows of T + 1 tokens of the validation split, in file order, without overlap or shuffle.

    Args:
        path: a folder written by ``build_dataset``.
        sequence_length: T, tokens a sample.
        num_samples: windows at most; ``len`` says how many there are.

    Raises:
        UserError: the dataset is missing or damaged, or the validation split is shorter than T + 1 tokens.
    """

    def __init__(self, path: str | Path, *, sequence_length: int, num_samples: int) -> None:
        self.manifest = read_manifest(path)
        self.sequence_length = sequence_length
        _check_length(self.manifest, "validation", path, sequence_length)
        self._indexed = IndexedDataset(str(Path(path) / "validation"))
        self._count = min(num_samples, self.manifest.splits["validation"]["tokens"] // (sequence_length + 1))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return window ``index``: tokens and labels int64 [T], loss_mask float32 [T]."""
        if not 0 <= index < self._count:
            raise IndexError(f"validation sample {index} of {self._count}")
        window = torch.from_numpy(self._window(index))  # [T + 1]
        return {"tokens": window[:-1].clone(), "labels": window[1:].clone(), "loss_mask": torch.ones(len(window) - 1)}

    def unigram_entropy(self) -> float:
        """Entropy in nats of the label frequencies over these samples: the loss of a model that knows only them."""
        counts = np.zeros(self.manifest.vocab_size, dtype=np.int64)  # [vocabulary]
        for index in range(self._count):
            counts += np.bincount(self._window(index)[1:], minlength=len(counts))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def _window(self, index: int) -> np.ndarray:
        """Tokens int64 [T + 1]; the builder leaves no gap between documents, so a window is one read."""
        length, dtype = self.sequence_length + 1, self._indexed.index.dtype
        return self._indexed.bin_reader.read(dtype, length, index * length * DType.size(dtype)).astype(np.int64)


def _tokenizer_facts(manifest: Manifest) -> Any:
    """The part of a tokenizer that GPTDataset looks at."""
    identifiers = OrderedDict(tokenizer_hash=manifest.tokenizer_hash, vocab_size=manifest.vocab_size)
    return SimpleNamespace(
        eod=manifest.end_of_document_id,
        eos=manifest.end_of_document_id,
        pad=_NO_PADDING,
        vocab_size=manifest.vocab_size,
        unique_identifiers=identifiers,
    )


def _check_length(manifest: Manifest, split: str, path: str | Path, sequence_length: int) -> None:
    tokens = manifest.splits[split]["tokens"]
    if tokens < sequence_length + 1:
        more = "give more sources" + (" or raise data.validation_fraction" if split == "validation" else "")
        raise UserError(
            f"data.sequence_length={sequence_length} needs {sequence_length + 1} tokens, and the {split} split of "
            f"{path} has {tokens}; legal: up to {tokens - 1}; shorten it, or {more} and rebuild"
        )
