"""Open the dataset that a model was trained on, or another one built with the same tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mosa.checkpoint import Metadata
from megatron_mosa.config import DataSection
from megatron_mosa.convert.model_config import NO_DATASET, check_vocabulary
from megatron_mosa.errors import UserError

if TYPE_CHECKING:
    from megatron_mosa.data import Mixture


def open_given_dataset(path: Path) -> Mixture:
    """Open the built dataset of the option ``--data``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from megatron_mosa.data import open_mixture

    try:
        return open_mixture(DataSection(path=str(path)))
    except UserError as error:
        raise type(error)(str(error).replace("data.path=", "--data=", 1)) from None


def open_dataset(metadata: Metadata, path: Path | None) -> Mixture:
    """Open the built dataset at ``path``, or the one recorded in the checkpoint if ``path`` is None.

    Raises:
        UserError: the dataset does not exist, or was built with another tokenizer, or, if the model came without one,
            with one that has more tokens than its embedding.
    """
    from megatron_mosa.data import open_mixture

    recorded = metadata.config["data"]
    fix = "pass a dataset built with the model's tokenizer: --data FOLDER"
    if path is not None:
        mixture = open_given_dataset(path)
    elif recorded.get("path") == NO_DATASET:
        raise UserError(f"the model came without a dataset; {fix}")
    else:
        try:
            mixture = open_mixture(DataSection(path=recorded.get("path"), blend=list(recorded.get("blend") or [])))
        except UserError as error:
            raise type(error)(f"the model's own dataset cannot be used: {error}; or {fix}") from None
    if metadata.tokenizer.file_hash is None:
        tokens, rows = mixture.manifest.vocab_size, metadata.data["vocab_size"]
        check_vocabulary(f"the tokenizer of '{mixture.paths[0]}'", tokens, rows, fix)
    elif not mixture.manifest.tokenizer.is_same(metadata.tokenizer):
        raise UserError(
            f"'{mixture.paths[0]}' was built with another tokenizer ({mixture.manifest.tokenizer_hash}) than the model "
            f"was trained with ({metadata.data['tokenizer_hash']}); {fix}"
        )
    return mixture
