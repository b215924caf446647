"""The shuffled passes over a mixture, and the folder that keeps their indices."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import distributed

from megatron_mosa.data.build import INDEX_CACHE
from megatron_mosa.data.hashing import file_sha256
from megatron_mosa.data.integrity import FileHash, open_indexed, refuse_damage
from megatron_mosa.data.manifest import Manifest
from megatron_mosa.data.mixture import Mixture
from megatron_mosa.errors import UserError

# mcore masks the loss of the pad token and replaces it by token 0. Documents are packed, nothing is padded, so the
# id must be one that no text has. It must not be equal to the end-of-document id either: mcore would then change it.
_NO_PADDING = -1
_HASHES = "hashes.json"


@dataclass(frozen=True)
class PassIndex:
    """Where the passes of one order lie, and how they are made. Everything that the order depends on is here.

    ``folder`` null: index_cache below the dataset, of a blend below its first.
    """

    mixture: Mixture
    sequence_length: int
    index_samples: int
    seed: int
    folder: Path | None = None

    @property
    def root(self) -> Path:
        """The folder of all passes."""
        return self.folder if self.folder is not None else self.mixture.paths[0] / INDEX_CACHE

    def path(self, number: int) -> Path:
        """The folder of one pass: everything that its order depends on is in the name."""
        fingerprint = self.mixture.fingerprint[:16]
        return self.root / f"{fingerprint}-t{self.sequence_length}-n{self.index_samples}-s{self.seed}-p{number}"

    def is_built(self, number: int) -> bool:
        """Whether the pass can be opened."""
        return self.path(number).is_dir()

    def check(self, number: int) -> None:
        """Compare the files of a pass with the hashes that ``build`` has written, as far as it has.

        Raises:
            UserError: one is damaged.
        """
        folder = self.path(number)
        fix = f"remove the folder '{folder}', and it is built again"
        try:
            recorded = json.loads((folder / _HASHES).read_text(encoding="utf-8"))
            files = [FileHash(folder / name, expected) for name, expected in recorded.items()]
            refuse_damage(files, fix)
        except FileNotFoundError as error:
            if Path(error.filename or "").name != _HASHES:  # an older one has none
                raise UserError(f"{error.filename} is missing; {fix}") from error
        except (ValueError, AttributeError) as error:
            raise UserError(f"{folder / _HASHES} is damaged; {fix}") from error

    def open(self, number: int) -> GPTDataset | BlendedDataset:
        """The samples of a pass that is built; nothing is written."""
        return self._dataset(number, self.path(number))

    def build(self, number: int) -> None:
        """Write the index of a pass beside its place and rename it: no reader ever meets half of it.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.root, prefix=".partial-", ignore_cleanup_errors=True) as partial:
                building = Path(partial) / "index"
                with _process_group() if len(self.mixture.paths) > 1 else contextlib.nullcontext():
                    self._dataset(number, building)
                hashes = {file.name: file_sha256(file) for file in sorted(building.iterdir())}
                (building / _HASHES).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
                try:
                    os.rename(building, self.path(number))
                except OSError:
                    if not self.is_built(number):  # else another loader process was first, with the same bytes
                        raise
        except OSError as error:
            existing = next(folder for folder in (self.root, *self.root.resolve().parents) if folder.is_dir())
            free = shutil.disk_usage(existing).free >> 20
            raise UserError(
                f"cannot write the sample index to {self.root}: {error.strerror} ({free} MB free); the folder must be "
                "writable when a run starts: change its permissions, set data.index_path to one that is, or build the "
                "index ahead with mosa data index"
            ) from error

    def _dataset(self, number: int, cache: Path) -> GPTDataset | BlendedDataset:
        """One pass. mcore reads its index from ``cache`` or, if that is empty, builds and writes it there."""
        config = GPTDatasetConfig(
            random_seed=(self.seed + number) % 2**32,
            sequence_length=self.sequence_length,
            path_to_cache=str(cache),
            tokenizer=_tokenizer_facts(self.mixture.manifest),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        weights = self.mixture.weights
        datasets = []
        for path, manifest, weight in zip(self.mixture.paths, self.mixture.manifests, weights, strict=True):
            # mcore's blend gives a dataset its turn when it is furthest behind its share: one sample ahead at most.
            samples = self.index_samples if len(weights) == 1 else math.ceil(weight * self.index_samples) + 1
            indexed = open_indexed(path / "train")
            documents = np.arange(len(indexed), dtype=np.int32)
            # The second argument only enters the cache key; a path there would tie the cache to where the folder lies.
            datasets.append(GPTDataset(indexed, manifest.fingerprint, documents, samples, Split.train, config))
        if len(datasets) == 1:
            return datasets[0]
        return BlendedDataset(datasets, list(weights), self.index_samples, config)


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """BlendedDataset before megatron-core 0.19 asks for its rank even where there is a single process."""
    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


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
