"""What ``mosa data verify`` and ``mosa data inspect`` tell of a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_mosa.config import blend_parts, load_config
from megatron_mosa.data.build import summary
from megatron_mosa.data.integrity import find_damage, open_indexed, recorded_hashes
from megatron_mosa.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    DamagedDatasetError,
    Manifest,
    load_manifest,
    read_manifest,
)
from megatron_mosa.data.tokenizer import TOKENIZER_FILE
from megatron_mosa.errors import RunError, UserError


def dataset_folders(path: Path, overrides: list[str]) -> list[Path]:
    """The dataset at ``path``; or those of a configuration file, in its section data.

    Raises:
        UserError: neither.
    """
    if path.is_dir():
        if overrides:
            raise UserError(f"'{path}' is a dataset; values such as {overrides[0]} go with a configuration file")
        return [path]
    data = load_config(path, overrides).data
    parts = [data.path] if data.path is not None else [part for _, part in blend_parts(data.blend)]
    return [Path(part).expanduser() for part in parts]


def verify(folder: Path) -> None:
    """Compare all files of a dataset with its manifest.

    Raises:
        UserError: no dataset.
        RunError: a file is damaged, missing or of another size.
    """
    try:
        manifest = read_manifest(folder)
        files = recorded_hashes(folder, manifest)
        if (damage := find_damage(files)) is not None:
            raise RunError(damage)
        for split in SPLITS:
            _check_index(folder, split, manifest)
    except DamagedDatasetError as error:  # which this command was asked about: no wrong use
        raise RunError(str(error)) from error
    unknown = [f"{split}.idx" for split in SPLITS if "idx_sha256" not in manifest.splits[split]]
    names = ", ".join([MANIFEST_FILE, TOKENIZER_FILE, *(file.path.name for file in files)])
    print(f"{folder}: sound ({names})")
    if unknown:
        print(f"  built before hashes of {' and '.join(unknown)} were recorded: their structure alone was checked")


def _check_index(folder: Path, split: str, manifest: Manifest) -> None:
    index = open_indexed(folder / split).index
    lengths = index.sequence_lengths.astype(np.int64)
    ends = lengths.cumsum() * index.dtype_size
    recorded = manifest.splits[split]
    if (
        len(lengths) != recorded["documents"]
        or lengths.sum() != recorded["tokens"]
        or (lengths < 1).any()
        or (index.sequence_pointers[1:] != ends[:-1]).any()
        or (index.sequence_pointers[:1] != 0).any()
        or (index.document_indices != np.arange(len(lengths) + 1)).any()
    ):
        raise RunError(f"{folder / split}.idx is damaged: its documents are not those of {MANIFEST_FILE}")


def inspect(folder: Path) -> None:
    """Print what a dataset holds and what it was made from.

    Raises:
        UserError: no dataset.
    """
    manifest = load_manifest(folder)
    print("\n".join(summary(str(folder), manifest)))
    for split in SPLITS:
        counts = manifest.splits[split]
        size = (counts["bin_bytes"] + counts["idx_bytes"]) / 2**20
        mean = counts["tokens"] / max(counts["documents"], 1)
        print(
            f"  {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {mean:,.0f} a document, "
            f"{size:,.1f} MiB"
        )
    end = manifest.end_of_document_id
    print(f"  tokenizer: {manifest.tokenizer_source}, SHA-256 {manifest.tokenizer_hash[:16]}..., end of document {end}")
    print(f"  special tokens: {manifest.special_tokens or 'not recorded'}")
    for source in manifest.sources:
        size = "" if source["bytes"] is None else f", {source['bytes'] / 2**20:,.1f} MiB"
        print(f"  source: {source['source']} ({source['kind']}, {source['files']:,} files{size})")
