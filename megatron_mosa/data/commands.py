"""Implement ``mosa data verify`` and ``mosa data inspect``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_mosa.config import load_config
from megatron_mosa.data.build import summary
from megatron_mosa.data.integrity import find_damage, read_index, recorded_hashes
from megatron_mosa.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    DamagedDatasetError,
    Manifest,
    load_manifest,
    read_manifest,
)
from megatron_mosa.data.mixture import dataset_parts
from megatron_mosa.data.tokenizer import TOKENIZER_FILE
from megatron_mosa.errors import RunError, UserError, nearest_path
from megatron_mosa.utils import counted


def dataset_folders(path: Path, overrides: list[str]) -> list[Path]:
    """Return the dataset folder at ``path``, or the folders that section data of a configuration file names.

    Raises:
        UserError: ``path`` does not exist, is a dataset although there are overrides, or is not a valid configuration.
    """
    if path.is_dir():
        if overrides:
            raise UserError(f"'{path}' is a dataset; overrides such as {overrides[0]} require a configuration file")
        return [path]
    if not path.exists():
        raise UserError(
            f"'{path}' does not exist{nearest_path(path)}; pass a dataset, or a configuration file whose "
            "section data names one"
        )
    return [folder for _, folder in dataset_parts(load_config(path, overrides).data)]


def verify(folder: Path) -> None:
    """Verify all files of a dataset against its manifest.

    Raises:
        UserError: the folder is not a dataset.
        RunError: a file is damaged, missing or of another size.
    """
    try:
        manifest = read_manifest(folder)
        files = recorded_hashes(folder, manifest)
        if (damage := find_damage(files)) is not None:
            raise RunError(damage)
        for split in SPLITS:
            _check_index(folder, split, manifest)
    except DamagedDatasetError as error:  # the finding of this command, not a user's mistake
        raise RunError(str(error)) from error
    unhashed = [f"{split}.idx" for split in SPLITS if "idx_sha256" not in manifest.splits[split]]
    names = ", ".join([MANIFEST_FILE, TOKENIZER_FILE, *(file.path.name for file in files)])
    print(f"{folder}: intact ({names})")
    if unhashed:
        print(f"  only the structure of {' and '.join(unhashed)} was checked: this older dataset has no hashes of them")


def _check_index(folder: Path, split: str, manifest: Manifest) -> None:
    index = read_index(folder / split)
    lengths = index.lengths.astype(np.int64)
    ends = lengths.cumsum() * index.element_bytes
    recorded = manifest.splits[split]
    if (
        len(lengths) != recorded["documents"]
        or lengths.sum() != recorded["tokens"]
        or (lengths < 1).any()
        or (index.offsets[1:] != ends[:-1]).any()
        or (index.offsets[:1] != 0).any()
        or not np.array_equal(index.documents, np.arange(len(lengths) + 1))
    ):
        raise RunError(f"{folder / split}.idx is damaged: its documents do not match {MANIFEST_FILE}")


def inspect(folder: Path) -> None:
    """Print what a dataset contains and what it was built from.

    Raises:
        UserError: the folder is not a dataset.
    """
    manifest = load_manifest(folder)
    print("\n".join(summary(str(folder), manifest)))
    for split in SPLITS:
        counts = manifest.splits[split]
        size = (counts["bin_bytes"] + counts["idx_bytes"]) / 2**20
        mean = counts["tokens"] / max(counts["documents"], 1)
        print(
            f"  {split}: {counted(counts['documents'], 'document')}, {counted(counts['tokens'], 'token')} "
            f"({mean:,.0f} per document), {size:,.1f} MiB"
        )
    end = manifest.end_of_document_id
    print(f"  tokenizer: {manifest.tokenizer_source}, SHA-256 {manifest.tokenizer_hash[:16]}..., end of document {end}")
    print(f"  special tokens: {manifest.special_tokens or 'not recorded'}")
    for source in manifest.sources:
        size = "" if source["bytes"] is None else f", {source['bytes'] / 2**20:,.1f} MiB"
        print(f"  source: {source['source']} ({source['kind']}, {counted(source['files'], 'file')}{size})")
