"""Find a model's tokenizer, verify it by its hash, and write it for transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from megatron_mosa.checkpoint import Metadata
from megatron_mosa.config import blend_parts
from megatron_mosa.convert.model_config import NO_DATASET, check_vocabulary
from megatron_mosa.errors import RunError, UserError


class FoundTokenizer(NamedTuple):
    """A tokenizer.json, and the id of its end-of-document token."""

    file: Path
    end_of_document_id: int


def find_tokenizer(metadata: Metadata, given: Path | None) -> FoundTokenizer:
    """Find the tokenizer that the model was trained with: the given one, or else the one in its dataset.

    Args:
        metadata: metadata of the checkpoint.
        given: a tokenizer.json, or a folder that contains one; None: use the dataset's.

    Raises:
        UserError: the tokenizer does not exist, or is not the model's, or has more tokens than the model.
    """
    from megatron_mosa.data import (
        TOKENIZER_FILE,
        end_of_document_id,
        load_tokenizer,
        tokenizer_identity,
        vocabulary_size,
    )

    folder = given or _dataset(metadata)
    file = folder / TOKENIZER_FILE if folder is not None and folder.is_dir() else folder
    if file is None or not file.is_file():
        reason = f"'{file}' does not exist" if file is not None else "its checkpoint holds none"
        raise UserError(f"could not find the model's tokenizer: {reason}; pass its tokenizer.json: --tokenizer PATH")
    tokenizer = load_tokenizer(str(file))
    recorded, found = metadata.tokenizer, tokenizer_identity(file, tokenizer)
    if recorded.file_hash is None:  # the size recorded instead is that of the embedding
        fix = "pass the model's own: --tokenizer PATH"
        check_vocabulary(f"'{file}'", vocabulary_size(tokenizer), metadata.data["vocab_size"], fix)
    elif not recorded.is_same(found):
        raise UserError(
            f"'{file}' is not the model's tokenizer: its SHA-256 is {found.file_hash} instead of "
            f"{recorded.file_hash}, and it encodes text differently; pass the right one: --tokenizer PATH"
        )
    try:
        return FoundTokenizer(file, end_of_document_id(tokenizer, file))
    except UserError as error:
        raise type(error)(str(error).replace("data.tokenizer", "--tokenizer", 1)) from None


def write_tokenizer(found: FoundTokenizer, sequence_length: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    A template that adds special tokens, such as Llama's leading <s>, is removed: training never saw them there.
    Otherwise the file is copied unchanged.
    """
    from megatron_mosa.data import TOKENIZER_FILE, adds_special_tokens, load_tokenizer

    tokenizer = load_tokenizer(str(found.file))
    if adds_special_tokens(found.file):
        (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    else:
        shutil.copyfile(found.file, folder / TOKENIZER_FILE)
    end_token = tokenizer.id_to_token(found.end_of_document_id)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_token,
        "pad_token": end_token,
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def check_exported_tokenizer(found: FoundTokenizer, folder: Path) -> None:
    """Compare the token ids that transformers produces for sample text with those used in training.

    Raises:
        RunError: the ids differ.
    """
    from transformers import AutoTokenizer

    from megatron_mosa.data import PROBE, load_tokenizer

    # This export wrote the folder's code; without the flag, transformers prompts for confirmation and blocks.
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer = load_tokenizer(str(found.file))
    for text in PROBE.splitlines(keepends=True):
        expected, actual = tokenizer.encode(text).ids, exported(text, verbose=False).input_ids
        if expected != actual:
            raise RunError(
                f"the exported tokenizer does not produce the token ids of training: {text[:30]!r} becomes "
                f"{actual[:8]} instead of {expected[:8]}; nothing was exported"
            )


def _dataset(metadata: Metadata) -> Path | None:
    data = metadata.config.get("data", {})
    parts = blend_parts(data.get("blend") or [])
    path = data.get("path") or (parts[0][1] if parts else None)
    return Path(path).expanduser() if path and path != NO_DATASET else None
