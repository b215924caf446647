"""The tokenizer of a model, found by its hash and written for transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from megatron_mosa.checkpoint.format import Metadata
from megatron_mosa.config.blend import blend_parts
from megatron_mosa.errors import RunError, UserError


class FoundTokenizer(NamedTuple):
    """A tokenizer.json, and the token that ends a document."""

    file: Path
    end_of_document_id: int


def find_tokenizer(metadata: Metadata, given: Path | None) -> FoundTokenizer:
    """The tokenizer that the model was trained with: the one given, else the one in its dataset.

    Args:
        given: a tokenizer.json, or a folder that holds one.

    Raises:
        UserError: there is none, or it is another one.
    """
    from megatron_mosa.data import end_of_document_id, load_manifest, load_tokenizer
    from megatron_mosa.data.manifest import MANIFEST_FILE
    from megatron_mosa.data.tokenizer import TOKENIZER_FILE, tokenizer_identity

    folder = given or _dataset(metadata)
    file = folder / TOKENIZER_FILE if folder is not None and folder.is_dir() else folder
    if file is None or not file.is_file():
        where = f"there is none at '{file}'" if file is not None else "the checkpoint names no dataset"
        raise UserError(f"the model's tokenizer is not found: {where}; give it: --tokenizer PATH of its tokenizer.json")
    recorded, found = metadata.tokenizer, tokenizer_identity(file)
    if recorded.file_hash is not None and not recorded.is_same(found):
        raise UserError(
            f"'{file}' is not the model's tokenizer: its SHA-256 is {found.file_hash}, the checkpoint's "
            f"{recorded.file_hash}, and it gives other ids; give the right one: --tokenizer PATH"
        )
    if given is None and (file.parent / MANIFEST_FILE).is_file():
        return FoundTokenizer(file, load_manifest(file.parent).end_of_document_id)
    return FoundTokenizer(file, end_of_document_id(load_tokenizer(str(file)), file))


def write_tokenizer(found: FoundTokenizer, sequence_length: int, folder: Path) -> int:
    """Write tokenizer.json and tokenizer_config.json; return the id of the end-of-document token.

    A template that adds special tokens, such as the <s> in front of Llama's texts, is left out: training has not seen
    them there. Otherwise the file stays as it is.
    """
    from megatron_mosa.data import load_tokenizer
    from megatron_mosa.data.tokenizer import TOKENIZER_FILE, adds_special_tokens

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
    return found.end_of_document_id


def check_exported_tokenizer(found: FoundTokenizer, folder: Path) -> None:
    """Compare the ids that transformers gives for real text with those that training saw.

    Raises:
        RunError: they differ.
    """
    from transformers import AutoTokenizer

    from megatron_mosa.data import load_tokenizer
    from megatron_mosa.data.tokenizer import PROBE

    # The folder's code was written by this export: without the flag transformers asks, and waits for an answer.
    exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokenizer = load_tokenizer(str(found.file))
    for text in PROBE.splitlines(keepends=True):
        expected, given = tokenizer.encode(text).ids, exported(text, verbose=False).input_ids
        if expected != given:
            raise RunError(
                f"the exported tokenizer gives other ids than training saw: {text[:30]!r} becomes {given[:8]}, and was "
                f"{expected[:8]}; nothing was exported"
            )


def _dataset(metadata: Metadata) -> Path | None:
    data = metadata.config.get("data", {})
    parts = blend_parts(data.get("blend") or [])
    path = data.get("path") or (parts[0][1] if parts else None)
    return Path(path).expanduser() if path else None
