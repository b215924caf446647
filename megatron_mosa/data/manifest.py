"""manifest.json: what a dataset folder holds, and what it was made from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_mosa.data.hashing import REBUILD
from megatron_mosa.data.tokenizer import TOKENIZER_FILE, TokenizerIdentity, tokenizer_hash
from megatron_mosa.errors import UserError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
NO_SPECIAL_TOKENS = "none but the end-of-document token, behind each document"

_BUILD = "mosa data build CONFIG"


class DamagedDatasetError(UserError):
    """A file of a dataset is not the one that was built: one line that names it."""


@dataclass(frozen=True)
class Manifest:
    """The description of a dataset. It holds no time and no absolute path of ours: equal input, equal bytes.

    ``splits[name]`` has documents, tokens, bin_bytes, idx_bytes, and the SHA-256 of both files. ``request`` is the
    settings and the state of the sources that the dataset was built from. Fields that are None were not known when the
    dataset was built.
    """

    tokenizer_hash: str
    tokenizer_source: str
    vocab_size: int  # one more than the highest token id
    end_of_document_id: int
    splits: dict[str, dict[str, Any]]
    request: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    encoding_hash: str | None = None  # see TokenizerIdentity
    special_tokens: str | None = None  # the rule by which every document was encoded, and is to be at inference
    left_out: dict[str, int] | None = None  # of the sources, or changed, and how often
    checksum: str | None = None  # SHA-256 of the manifest without it

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The sources as given, with kind, number of files and bytes."""
        return self.request["sources"]

    @property
    def text_field(self) -> str:
        """The column that the texts of JSON lines and Parquet came from."""
        return self.request["text_field"]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the manifest, and through the hashes in it over tokenizer and tokens."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """What tells its tokenizer from others."""
        return TokenizerIdentity(self.tokenizer_hash, self.encoding_hash)

    def to_json(self) -> str:
        """The text of manifest.json."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        return json.dumps(known, indent=2, sort_keys=True) + "\n"

    def sealed(self) -> Manifest:
        """The manifest with its checksum."""
        return replace(self, checksum=replace(self, checksum=None).fingerprint)


def load_manifest(path: str | Path) -> Manifest:
    """Read manifest.json of a dataset folder without looking at the other files.

    Raises:
        UserError: no folder, no manifest, or a newer format.
        DamagedDatasetError: a manifest that cannot be read.
    """
    file = Path(path) / MANIFEST_FILE
    if not file.is_file():
        what = "is no dataset: it has no manifest.json" if Path(path).is_dir() else "does not exist"
        raise UserError(f"data.path={path} {what}; build it with: {_BUILD}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version == FORMAT_VERSION:
            manifest = Manifest(**content)
            if manifest.checksum is not None and manifest.sealed() != manifest:
                raise ValueError("its content does not have its checksum")
            return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedDatasetError(f"{file} cannot be read ({error}); rebuild the dataset: {_BUILD} --force") from error
    raise UserError(
        f"{file} has format version {version}, and this code reads version {FORMAT_VERSION}; "
        f"update the code, or rebuild the dataset: {_BUILD} --force"
    )


def read_manifest(path: str | Path) -> Manifest:
    """Read and verify a dataset folder: files present, of the recorded sizes, and with the recorded tokenizer.

    Raises:
        UserError: whatever ``load_manifest`` finds.
        DamagedDatasetError: a missing or truncated file, a tokenizer.json that is not the recorded one.
    """
    manifest, folder = load_manifest(path), Path(path)
    for split in SPLITS:
        for suffix in ("bin", "idx"):
            file, expected = folder / f"{split}.{suffix}", manifest.splits[split][f"{suffix}_bytes"]
            if not file.is_file():
                raise DamagedDatasetError(f"{file} is missing ({expected} bytes expected); {REBUILD}")
            if file.stat().st_size != expected:
                size = file.stat().st_size
                raise DamagedDatasetError(f"{file} has {size} bytes, and {expected} are expected; {REBUILD}")
    tokenizer = folder / TOKENIZER_FILE
    if not tokenizer.is_file():
        raise DamagedDatasetError(f"{tokenizer} is missing; {REBUILD}")
    if (found := tokenizer_hash(tokenizer)) != manifest.tokenizer_hash:
        raise DamagedDatasetError(
            f"{tokenizer} is not the file that the dataset was built with, but damaged or replaced: its SHA-256 is "
            f"{found[:16]}..., and {manifest.tokenizer_hash[:16]}... is recorded; {REBUILD}"
        )
    return manifest
