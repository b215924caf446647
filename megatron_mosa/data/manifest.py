"""manifest.json: what a dataset folder contains, and what it was built from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_mosa.data.hashing import REBUILD
from megatron_mosa.data.tokenizer import (
    TOKENIZER_FILE,
    TokenizerIdentity,
    named_end_of_document,
    tokenizer_hash,
    tokenizer_identity,
)
from megatron_mosa.errors import UserError
from megatron_mosa.utils import load_json, read_record

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
NO_SPECIAL_TOKENS = "none but the end-of-document token, behind each document"  # recorded: do not change a word

_BUILD = "mosa data build CONFIG"


class DamagedDatasetError(UserError):
    """A file of a dataset is missing or not the one that was built; the message names it in one line."""


@dataclass(frozen=True)
class Manifest:
    """The description of a dataset. It contains no time and no absolute path, so equal input gives equal bytes.

    ``splits[name]`` has documents, tokens, bin_bytes, idx_bytes, and the SHA-256 of both files. ``request`` contains
    the settings and the state of the sources that the dataset was built from. Fields are None if an earlier version,
    which did not record them, built the dataset.
    """

    tokenizer_hash: str
    tokenizer_source: str
    vocab_size: int  # one more than the highest token id
    end_of_document_id: int
    splits: dict[str, dict[str, Any]]
    request: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    encoding_hash: str | None = None  # see TokenizerIdentity
    special_tokens: str | None = None  # how documents were encoded, and prompts should be
    left_out: dict[str, int] | None = None  # counts of what was left out or changed, by the names of left_out.py
    checksum: str | None = None  # SHA-256 of the manifest without it

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The sources as given, each with its kind, number of files and bytes."""
        return self.request["sources"]

    @property
    def source_names(self) -> list[str]:
        """The sources as given in ``data.sources`` of the build."""
        return [source["source"] for source in self.sources]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which covers tokenizer and tokens because the manifest contains their hashes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def tokenizer(self) -> TokenizerIdentity:
        return TokenizerIdentity(self.tokenizer_hash, self.encoding_hash)

    def to_json(self) -> str:
        """Return the content of manifest.json."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        return json.dumps(known, indent=2, sort_keys=True) + "\n"

    def sealed(self) -> Manifest:
        """Return the manifest with its checksum."""
        return replace(self, checksum=replace(self, checksum=None).fingerprint)


def load_manifest(path: str | Path, key: str = "data.path") -> Manifest:
    """Read manifest.json of a dataset folder without looking at the other files.

    Args:
        key: of the configuration, which names the folder.

    Raises:
        UserError: the folder or the manifest does not exist, or the format is newer.
        DamagedDatasetError: the manifest cannot be read.
    """
    file = Path(path) / MANIFEST_FILE
    if not file.is_file():
        known = f"is not a dataset: it has no {MANIFEST_FILE}" if Path(path).is_dir() else "is not a directory"
        problem = known if Path(path).exists() else "does not exist"
        raise UserError(f"{key}={path} {problem}; build it with: {_BUILD}")
    try:
        content = load_json(file)
        version = content["format_version"]
        if version == FORMAT_VERSION:
            manifest = read_record(Manifest, content, knows_all=True)
            if manifest.checksum is not None and manifest.sealed() != manifest:
                raise ValueError("its content does not match its checksum")
            return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedDatasetError(f"could not read {file} ({error}); rebuild the dataset: {_BUILD} --force") from error
    raise UserError(
        f"{file} has format version {version}, but this code reads version {FORMAT_VERSION}; "
        f"update the code, or rebuild the dataset: {_BUILD} --force"
    )


def read_manifest(path: str | Path, key: str = "data.path") -> Manifest:
    """Read the manifest of a dataset folder, and check the sizes of its files and the tokenizer's hash.

    Args:
        key: of the configuration, which names the folder.

    Raises:
        UserError: as ``load_manifest``.
        DamagedDatasetError: a file is missing or of another size, or tokenizer.json is not the recorded one.
    """
    manifest, folder = load_manifest(path, key), Path(path)
    for split in SPLITS:
        for suffix in ("bin", "idx"):
            file, expected = folder / f"{split}.{suffix}", manifest.splits[split][f"{suffix}_bytes"]
            if not file.is_file():
                raise DamagedDatasetError(f"{file} is missing (expected {expected} bytes); {REBUILD}")
            if (size := file.stat().st_size) != expected:
                raise DamagedDatasetError(f"{file} has {size} bytes instead of {expected}; {REBUILD}")
    tokenizer = folder / TOKENIZER_FILE
    if not tokenizer.is_file():
        raise DamagedDatasetError(f"{tokenizer} is missing; {REBUILD}")
    if (found := tokenizer_hash(tokenizer)) != manifest.tokenizer_hash:
        raise DamagedDatasetError(
            f"{tokenizer} is damaged or was replaced since the dataset was built: its SHA-256 is {found[:16]}... "
            f"instead of the recorded {manifest.tokenizer_hash[:16]}...; {REBUILD}"
        )
    return manifest


def end_of_document_id(tokenizer: Tokenizer, path: Path | None = None) -> int:
    """Return the id of the token that ends a document.

    The tokenizer of a dataset keeps the one that the dataset was built with. For others, see ``named_end_of_document``.

    Args:
        tokenizer: the tokenizer.
        path: its file, if it is one.

    Raises:
        UserError: the vocabulary has none of the usual ones.
        DamagedDatasetError: the manifest beside ``path`` cannot be read.
    """
    marks = (MANIFEST_FILE, f"{SPLITS[0]}.bin")  # exported models have a manifest.json, too
    if path is not None and all((path.parent / mark).is_file() for mark in marks):
        manifest = load_manifest(path.parent)
        if manifest.tokenizer.is_same(tokenizer_identity(path, tokenizer)):
            return manifest.end_of_document_id
    return named_end_of_document(tokenizer, path)
