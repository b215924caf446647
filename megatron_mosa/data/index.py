"""The shuffled passes over a mixture, and the folder that stores their sample indices."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import distributed

from megatron_mosa.data.build import INDEX_CACHE
from megatron_mosa.data.hashing import file_sha256
from megatron_mosa.data.integrity import FileHash, find_damage, open_indexed
from megatron_mosa.data.manifest import DamagedDatasetError, Manifest
from megatron_mosa.data.mixture import Mixture
from megatron_mosa.errors import UserError
from megatron_mosa.utils import free_megabytes, load_json

if TYPE_CHECKING:
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset

# mcore masks the loss of the pad token and replaces it by token 0. Documents are packed without padding, so the id must
# not occur in any text. It must also differ from the end-of-document id, or mcore would change it.
_NO_PADDING = -1
_HASHES = "hashes.json"


@dataclass(frozen=True)
class PassIndex:
    """Everything that the order of a run's passes depends on, and where their indices are stored.

    ``folder`` None: index_cache in the dataset, or in the first dataset of a blend.
    """

    mixture: Mixture
    sequence_length: int
    index_samples: int
    seed: int
    folder: Path | None = None

    @property
    def root(self) -> Path:
        return self.folder if self.folder is not None else self.mixture.paths[0] / INDEX_CACHE

    def path(self, number: int) -> Path:
        """Return the folder of one pass, whose name contains everything that the order depends on."""
        fingerprint = self.mixture.fingerprint[:16]
        return self.root / f"{fingerprint}-t{self.sequence_length}-n{self.index_samples}-s{self.seed}-p{number}"

    def is_built(self, number: int) -> bool:
        return self.path(number).is_dir()

    def check(self, number: int) -> None:
        """Verify the files of a pass against the hashes that ``build`` wrote; indices of earlier versions have none.

        Raises:
            UserError: a file is damaged or missing.
        """
        folder = self.path(number)
        fix = f"remove the folder '{folder}'; it will be rebuilt"
        try:
            recorded = load_json(folder / _HASHES)
            files = [FileHash(folder / name, expected) for name, expected in recorded.items()]
            damage = find_damage(files, fix)  # here and now, whatever their size: nothing hashes them during the run
        except FileNotFoundError:
            return
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{folder / _HASHES} is damaged; {fix}") from error
        if damage is not None:
            raise DamagedDatasetError(damage)

    def open(self, number: int) -> GPTDataset | BlendedDataset:
        """Return the samples of a built pass, without writing anything."""
        return self._dataset(number, self.path(number))

    def build(self, number: int) -> None:
        """Build the index of a pass in a temporary folder, then rename it, so that readers never see half of it.

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
                    if not self.is_built(number):  # otherwise another loader process was first, with the same bytes
                        raise
        except MemoryError:
            raise UserError(
                f"the index of {self.index_samples:,} samples in one shuffled pass needs more memory than this machine "
                "has; set data.index_samples, by which a run takes several passes"
            ) from None
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"could not write the sample index to {self.root}, which is not a directory and must be writable when "
                "a run starts; set data.index_path to another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"could not write the sample index to {self.root}: {error.strerror} ({free_megabytes(self.root)} MB "
                "free); it must be writable when a run starts: change its permissions, set data.index_path to another "
                "folder, or build the index in advance with mosa data index"
            ) from error

    def _dataset(self, number: int, cache: Path) -> GPTDataset | BlendedDataset:
        """Return one pass. mcore reads its index from ``cache`` or, if that is empty, builds and writes it there."""
        from megatron.core.datasets.blended_dataset import BlendedDataset  # slow to import
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split

        config = GPTDatasetConfig(
            random_seed=(self.seed + number) % 2**32,
            sequence_length=self.sequence_length,
            path_to_cache=str(cache),
            tokenizer=_tokenizer_stub(self.mixture.manifest),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        weights = self.mixture.weights
        datasets = []
        for path, manifest, weight in zip(self.mixture.paths, self.mixture.manifests, weights, strict=True):
            # mcore's blend takes the dataset that is furthest behind its share, so none exceeds it by more than one.
            samples = self.index_samples if len(weights) == 1 else math.ceil(weight * self.index_samples) + 1
            indexed = open_indexed(path / "train")
            documents = np.arange(len(indexed), dtype=np.int32)
            # The second argument only enters the cache key; a path would tie the cache to the dataset's location.
            datasets.append(GPTDataset(indexed, manifest.fingerprint, documents, samples, Split.train, config))
        if len(datasets) == 1:
            return datasets[0]
        return BlendedDataset(datasets, list(weights), self.index_samples, config)


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """Provide a process group of one: before megatron-core 0.19, BlendedDataset asks for its rank in any case."""
    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _tokenizer_stub(manifest: Manifest) -> Any:
    """Return the attributes of a tokenizer that GPTDataset uses."""
    identifiers = OrderedDict(tokenizer_hash=manifest.tokenizer_hash, vocab_size=manifest.vocab_size)
    return SimpleNamespace(
        eod=manifest.end_of_document_id,
        eos=manifest.end_of_document_id,
        pad=_NO_PADDING,
        vocab_size=manifest.vocab_size,
        unique_identifiers=identifiers,
    )
