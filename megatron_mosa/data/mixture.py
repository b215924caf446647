"""The training data of a run: one built dataset, or several in fixed shares."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mosa.config import DataSection, blend_parts, expanded
from megatron_mosa.data.integrity import FileHash, recorded_hashes, refuse_damage
from megatron_mosa.data.manifest import Manifest, read_manifest
from megatron_mosa.data.tokenizer import (
    TOKENIZER_FILE,
    encoding_hash,
    load_tokenizer,
    tokenizer_identity,
    tokenizer_path,
)
from megatron_mosa.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """Built datasets with the same tokenizer, and the share of the samples that comes from each."""

    paths: tuple[Path, ...]
    weights: tuple[float, ...]  # they sum to 1
    manifests: tuple[Manifest, ...]

    @property
    def manifest(self) -> Manifest:
        """The first dataset's manifest; tokenizer and vocabulary are the same in all."""
        return self.manifests[0]

    @property
    def fingerprint(self) -> str:
        """The only dataset's fingerprint, or a SHA-256 of weights and fingerprints in order; checkpoints record it."""
        fingerprints = [manifest.fingerprint for manifest in self.manifests]
        if len(fingerprints) == 1:
            return fingerprints[0]
        return hashlib.sha256(json.dumps([self.weights, fingerprints]).encode()).hexdigest()

    @property
    def source_names(self) -> list[str]:
        """The sources of all datasets."""
        return [name for manifest in self.manifests for name in manifest.source_names]

    @property
    def fewest_index_samples(self) -> int:
        """The fewest samples of a pass that keep every share to within 1 %, or a million.

        A pass begins with a sample of every dataset, so a weight w may get up to 1 sample of n too much.
        """
        return 1 if len(self.weights) == 1 else min(math.ceil(100 / min(self.weights)), 1_000_000)

    def hashes(self) -> list[FileHash]:
        """Return the recorded hashes of all token files."""
        parts = zip(self.paths, self.manifests, strict=True)
        return [file for path, manifest in parts for file in recorded_hashes(path, manifest)]


def dataset_parts(data: DataSection) -> list[tuple[float, Path]]:
    """Return the weight and the folder of each dataset: that of ``data.path``, or those of ``data.blend``.

    Raises:
        UserError: the blend is not well-formed, or a path names an unknown user.
    """
    if data.path is not None:
        return [(1.0, expanded("data.path", data.path))]
    return [(weight, expanded("data.blend", path)) for weight, path in blend_parts(data.blend)]


def open_mixture(data: DataSection, *, reads_all: bool = True) -> Mixture:
    """Read and verify the dataset at ``data.path``, or the datasets of ``data.blend``.

    Args:
        data: section ``data`` of the configuration.
        reads_all: also verify the hashes of the token files, unless they exceed one gigabyte or ``data.check_hashes``
            is off.

    Raises:
        UserError: as ``read_manifest``; a hash differs; the blend is not well-formed, contains a dataset twice, or
            mixes tokenizers.
    """
    weights, paths = zip(*dataset_parts(data), strict=True)
    key = "data.blend" if data.path is None else "data.path"
    manifests = [read_manifest(path, key) for path in paths]
    _check_blend([str(path) for path in paths], manifests)
    mixture = Mixture(
        paths=paths,
        weights=tuple(weight / sum(weights) for weight in weights),
        manifests=tuple(manifests),
    )
    if reads_all and data.check_hashes:
        refuse_damage(mixture.hashes())
    return mixture


def check_tokenizer(data: DataSection, mixture: Mixture) -> None:
    """Raise a UserError if a dataset was built with another tokenizer than the section names."""
    if data.path is None:
        return  # a blend: one dataset's tokenizer is usually given to the others by its path
    built, wanted = mixture.manifest.request["tokenizer"], data.tokenizer
    if built != wanted and not _is_file_of(wanted, mixture.manifest):
        raise UserError(
            f"data.tokenizer={wanted or 'null'}, but the dataset {data.path} was built with another tokenizer: "
            f"{built or 'null (trained on its data)'}; rebuild it (mosa data build CONFIG --force) or restore the key"
        )


def _is_file_of(wanted: str | None, manifest: Manifest) -> bool:
    """Return whether a path means the tokenizer of a dataset, under whatever name."""
    path = None if wanted is None or manifest.request["tokenizer"] is None else tokenizer_path(wanted)
    return path is not None and manifest.tokenizer.is_same(tokenizer_identity(path))


def _has_same_tokenizer(path: str, manifest: Manifest, other_path: str, other: Manifest) -> bool:
    if manifest.tokenizer.is_same(other.tokenizer):
        return True
    if manifest.encoding_hash is not None and other.encoding_hash is not None:
        return False
    files = (Path(folder) / TOKENIZER_FILE for folder in (path, other_path))  # not recorded: compute it
    return len({encoding_hash(load_tokenizer(str(file))) for file in files}) == 1


def _end_of_document(path: str, manifest: Manifest) -> str:
    return str(load_tokenizer(str(Path(path) / TOKENIZER_FILE)).id_to_token(manifest.end_of_document_id))


def _check_blend(paths: Sequence[str], manifests: Sequence[Manifest]) -> None:
    first, seen = manifests[0], dict[str, str]()
    for path, manifest in zip(paths, manifests, strict=True):
        is_same = _has_same_tokenizer(paths[0], first, path, manifest)
        if not is_same or manifest.end_of_document_id != first.end_of_document_id:
            difference = "different tokenizers"
            if is_same:
                tokens = (_end_of_document(paths[0], first), _end_of_document(path, manifest))
                difference = f"different end-of-document tokens ({' and '.join(tokens)})"
            raise UserError(
                f"data.blend: {paths[0]} and {path} were built with {difference}; rebuild the second with the first "
                f"one's: mosa data build CONFIG data.path={path} data.tokenizer={paths[0]} --force"
            )
        if manifest.fingerprint in seen:
            raise UserError(
                f"data.blend: {seen[manifest.fingerprint]} and {path} are the same dataset; list it once, with the sum "
                "of the weights"
            )
        seen[manifest.fingerprint] = path
