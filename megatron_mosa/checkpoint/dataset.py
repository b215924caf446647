"""The dataset that a checkpoint's model was trained on, or another of its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mosa.checkpoint.format import Metadata
from megatron_mosa.config.schema import DataSection
from megatron_mosa.errors import UserError

if TYPE_CHECKING:
    from megatron_mosa.data import Mixture


def open_dataset(metadata: Metadata, path: Path | None) -> Mixture:
    """Open what the checkpoint names, or the built dataset at ``path``.

    Raises:
        UserError: there is none, or it was built with another tokenizer.
    """
    from megatron_mosa.data import open_mixture

    described = metadata.config["data"]
    section = DataSection(path=described.get("path"), blend=list(described.get("blend") or []))
    if path is not None:
        section = DataSection(path=str(path))
    mixture = open_mixture(section)
    if not mixture.manifest.tokenizer.is_same(metadata.tokenizer):
        raise UserError(
            f"the model was trained with another tokenizer ({metadata.data['tokenizer_hash']}) than "
            f"'{mixture.paths[0]}' was built with ({mixture.manifest.tokenizer_hash}); give a dataset of the model's: "
            "--data FOLDER"
        )
    return mixture
