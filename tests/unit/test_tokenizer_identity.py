"""Two tokenizers are the same if they produce the same ids, even if their files differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_mosa.checkpoint import Metadata
from megatron_mosa.config.schema import DataSection
from megatron_mosa.convert import open_dataset
from megatron_mosa.convert.formats.hf_tokenizer import find_tokenizer
from megatron_mosa.data import build_dataset, load_manifest, open_mixture, train_tokenizer
from megatron_mosa.data.tokenizer import TokenizerIdentity, tokenizer_identity
from megatron_mosa.errors import UserError

TEXTS = [f"Document {number}: some words, {number * number} of them" for number in range(100)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, 300).save(str(path))
    return path


def template(content: dict[str, Any]) -> None:
    """Add a template that puts a token before every text, like Llama's <s>."""
    pieces = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": tokens,
    }  # fmt: skip


def truncate_and_pad(content: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    content |= json.loads(tokenizer.to_str())


def swap_two_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add_a_token(content: dict[str, Any]) -> None:
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 300, "content": "<stop>"})


def remove_a_merge(content: dict[str, Any]) -> None:
    """Keep the vocabulary, but make its last token unreachable."""
    content["model"]["merges"].pop()


def changed(file: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a changed tokenizer.json to a folder; return its path."""
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert path.read_bytes() != file.read_bytes()
    return path


@pytest.mark.parametrize("change", [lambda content: None, template, truncate_and_pad])
def test_the_same_tokenizer_in_another_file(file: Path, tmp_path: Path, change: Any) -> None:
    ours, theirs = tokenizer_identity(file), tokenizer_identity(changed(file, tmp_path, change))
    assert ours.file_hash != theirs.file_hash
    assert ours.is_same(theirs) and theirs.is_same(ours)


@pytest.mark.parametrize(
    "change",
    [
        swap_two_ids,
        add_a_token,
        remove_a_merge,
        lambda content: content.update(normalizer={"type": "Lowercase"}),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
    ],
)
def test_a_tokenizer_that_produces_other_ids(file: Path, tmp_path: Path, change: Any) -> None:
    ours, theirs = tokenizer_identity(file), tokenizer_identity(changed(file, tmp_path, change))
    assert not ours.is_same(theirs) and not theirs.is_same(ours)


def test_files_are_compared_if_ids_were_not_recorded() -> None:
    assert TokenizerIdentity("a", None).is_same(TokenizerIdentity("a", "ids"))
    assert not TokenizerIdentity("a", None).is_same(TokenizerIdentity("b", None))
    assert not TokenizerIdentity("a", "ids").is_same(TokenizerIdentity("b", None))


def metadata(identity: TokenizerIdentity, vocab_size: int = 300) -> Metadata:
    data = {"tokenizer_hash": identity.file_hash, "encoding_hash": identity.encoding_hash, "vocab_size": vocab_size}
    config = {"data": {"path": "none"}}
    return Metadata(step=0, consumed_samples=0, optimizer_step=0, config=config, data=data, versions={}, layout={})


def test_an_export_accepts_a_tokenizer_that_produces_the_same_ids(file: Path, tmp_path: Path) -> None:
    trained = metadata(tokenizer_identity(file))
    assert find_tokenizer(trained, changed(file, tmp_path, template)).end_of_document_id == 0
    with pytest.raises(UserError, match=r"is not the model's tokenizer: .*, and it encodes text differently"):
        find_tokenizer(trained, changed(file, tmp_path, swap_two_ids))


def test_a_model_without_a_tokenizer_takes_any_that_its_embedding_has_rows_for(file: Path, tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    build_dataset(DataSection(path=str(tmp_path / "data"), sources=[str(source)], tokenizer=str(file)))
    for rows in (300, 299):
        imported = metadata(TokenizerIdentity(None, None), rows)
        for take, option in ((find_tokenizer, "--tokenizer PATH"), (open_dataset, "--data FOLDER")):
            if rows == 300:
                take(imported, tmp_path / "data")
            else:
                with pytest.raises(UserError, match=f"300 tokens, but the embedding only 299 rows; pass .*: {option}"):
                    take(imported, tmp_path / "data")


def test_the_tokenizer_of_a_dataset_keeps_its_end_of_document_token(file: Path, tmp_path: Path) -> None:
    given = changed(file, tmp_path, add_a_token)
    configured = tmp_path / "tokenizer_config.json"
    configured.write_text('{"eos_token": "<stop>"}', encoding="utf-8")
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")

    def build(name: str, tokenizer: Path) -> str:
        build_dataset(DataSection(path=str(tmp_path / name), sources=[str(source)], tokenizer=str(tokenizer)))
        return f"0.5 {tmp_path / name}"

    first, second = build("first", given), build("second", tmp_path / "first")
    mixture = open_mixture(DataSection(blend=[first, second]))
    assert [manifest.end_of_document_id for manifest in mixture.manifests] == [300, 300]
    trained = metadata(tokenizer_identity(given))
    assert find_tokenizer(trained, tmp_path / "first").end_of_document_id == 300
    configured.unlink()
    other = build("other", given)
    ends = r"different end-of-document tokens \(<stop> and <\|endoftext\|>\); rebuild the second"
    with pytest.raises(UserError, match=ends):
        open_mixture(DataSection(blend=[first, other]))


def test_a_blend_accepts_tokenizers_that_produce_the_same_ids(file: Path, tmp_path: Path) -> None:
    """The manifest of an older build records only the hash of the file."""
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    changes: dict[str, Any] = {"same": lambda content: None, "other": remove_a_merge}
    for name, change in {"first": None, **changes}.items():
        (tmp_path / "given" / name).mkdir(parents=True)
        tokenizer = file if change is None else changed(file, tmp_path / "given" / name, change)
        build_dataset(DataSection(path=str(tmp_path / name), sources=[str(source)], tokenizer=str(tokenizer)))
    saved = changed(tmp_path / "same" / "tokenizer.json", tmp_path / "given", changes["same"])
    manifest = tmp_path / "same" / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    for name in ("checksum", "encoding_hash"):
        del content[name]
    content["tokenizer_hash"] = tokenizer_identity(saved).file_hash
    saved.replace(tmp_path / "same" / "tokenizer.json")
    manifest.write_text(json.dumps(content), encoding="utf-8")
    assert load_manifest(tmp_path / "same").tokenizer.encoding_hash is None
    entries = [f"0.5 {tmp_path}/first", f"0.5 {tmp_path}/same"]
    assert len(open_mixture(DataSection(blend=entries)).paths) == 2
    with pytest.raises(UserError, match="were built with different tokenizers"):
        open_mixture(DataSection(blend=[entries[0], f"0.5 {tmp_path}/other"]))
