"""The metadata of a checkpoint, and the checkpoints of a run; nothing here imports torch."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mosa.checkpoint.manifest import DamagedError
from megatron_mosa.config import DataSection, ModelSection, MosaSection, RunSection
from megatron_mosa.errors import UserError
from megatron_mosa.utils import known_values, load_json, read_record

if TYPE_CHECKING:
    from megatron_mosa.data import TokenizerIdentity

FORMAT_VERSION = 2
METADATA = "metadata.json"
_READ_OF_CONFIG: dict[str, tuple[type, tuple[str, ...]]] = {
    "run": (RunSection, ("seed",)),
    "model": (ModelSection, ("num_layers", "hidden_size", "num_dense_heads")),
    "mosa": (MosaSection, ("num_heads",)),
    "data": (DataSection, ("sequence_length",)),
}
"""Sections and the keys that every checkpoint has; later versions have added others."""

_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class Metadata:
    """The content of ``metadata.json``; plain JSON."""

    step: int
    """Optimizer steps taken, skipped ones included."""

    consumed_samples: int
    """Samples consumed over all data-parallel ranks: the position in the data order."""

    optimizer_step: int
    """Adam's step count."""

    config: dict[str, Any]
    """The resolved configuration."""

    data: dict[str, Any]
    """index_samples, tokenizer_hash, encoding_hash, vocab_size, fingerprint and sources of the dataset."""

    versions: dict[str, str]
    """Versions of the software that wrote the checkpoint."""

    layout: dict[str, int]
    """Tensor- and data-parallel size of the run that wrote the checkpoint; informational only."""

    format_version: int = FORMAT_VERSION

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """Identity of the dataset's tokenizer."""
        from megatron_mosa.data import TokenizerIdentity

        return TokenizerIdentity.recorded(self.data)

    @property
    def has_manifest(self) -> bool:
        """Whether checkpoints of this format version have a manifest."""
        return self.format_version >= 2


def published_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints under their final names in a ``checkpoints/`` folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _check_config(config: dict[str, Any]) -> None:
    """Check what is read of a checkpoint's configuration without building it.

    Raises:
        ValueError: a key is missing, or has another type.
    """
    for section, (kind, names) in _READ_OF_CONFIG.items():
        try:
            values = known_values(kind, config.get(section))
        except ValueError as error:
            raise ValueError(f"config.{section}: {error}") from None
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"config.{section} has no {missing[0]}")


def write_metadata(metadata: Metadata, path: Path) -> None:
    """Write ``metadata.json`` into a checkpoint folder."""
    (path / METADATA).write_text(json.dumps(asdict(metadata), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_metadata(path: Path) -> Metadata:
    """Read ``metadata.json`` of a checkpoint folder.

    Raises:
        DamagedError: the file is missing or damaged.
        UserError: the format is newer than this version supports.
    """
    file = path / METADATA
    try:
        content = load_json(file)
        version = content["format_version"]
        if int(version) <= FORMAT_VERSION:
            metadata = read_record(Metadata, content, knows_all=True)
            _check_config(metadata.config)
            return metadata
    except OSError as error:
        raise DamagedError(f"metadata.json cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedError(f"metadata.json is damaged ({type(error).__name__}: {error})") from None
    raise UserError(
        f"checkpoint '{path}' has format version {version}, but this megatron_mosa reads versions up to "
        f"{FORMAT_VERSION}; update megatron_mosa"
    )
