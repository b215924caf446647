"""Builds: equal input gives equal bytes, tokens decode to their text, and every user error names its fix."""

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer, models

from megatron_mosa.config.schema import DataSection
from megatron_mosa.data import (
    build,
    build_dataset,
    check_tokenizer,
    end_of_document_id,
    load_tokenizer,
    open_mixture,
    read_manifest,
    train_tokenizer,
)
from megatron_mosa.data.hub import SourceInterruptedError
from megatron_mosa.data.sources import FileSource, _in_order, open_source
from megatron_mosa.errors import UserError

TEXTS = [f"Document {i}: " + " ".join(f"wörd{i * j % 23}\r\n" for j in range(40)) for i in range(60)]
TEXTS[3] = "a text that mentions <|endoftext|> itself"
FRACTION = 0.3


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return folder


def section(tmp_path: Path, source: Path | str, name: str = "set", **changes) -> DataSection:
    settings = {"vocab_size": 400, "validation_fraction": FRACTION, "sequence_length": 32} | changes
    return DataSection(path=str(tmp_path / name), sources=[str(source)], **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def sequences(folder: Path, split: str) -> list[np.ndarray]:
    stored = IndexedDataset(str(folder / split))
    return [np.array(stored[number]) for number in range(len(stored))]


def decoded(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    texts = []
    for ids in sequences(folder, split):
        assert ids[-1] == end and end not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False))
    return texts


def held_out(text: str) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < FRACTION * 2**64


def test_a_build_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does another one that starts while the folder gets its name."""
    data, others = section(tmp_path, write_texts(tmp_path / "texts")), []

    def start_another(path: Path) -> None:
        with pytest.raises(UserError, match="another process is building"):
            build_dataset(data)
        others.append(path)

    monkeypatch.setattr(build, "sync", start_another)
    build_dataset(data)
    assert len(others) == 1 and ".lock" not in contents(tmp_path / "set")
    (tmp_path / "set" / ".lock").touch()  # as a build that is killed then, or an earlier version
    build_dataset(data)
    build_dataset(data, force=True)
    assert ".lock" not in contents(tmp_path / "set")


def test_same_input_gives_same_bytes_in_another_process(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts")
    build_dataset(section(tmp_path, source, "one"))
    code = (
        "from megatron_mosa.config.schema import DataSection; from megatron_mosa.data import build_dataset;"
        f"build_dataset(DataSection(path={str(tmp_path / 'two')!r}, sources=[{str(source)!r}], vocab_size=400,"
        f"validation_fraction={FRACTION}))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)
    names = ["manifest.json", "tokenizer.json", "train.bin", "train.idx", "validation.bin", "validation.idx"]
    assert list(contents(tmp_path / "one")) == names
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert not list(tmp_path.glob(".*"))  # no partial folder left


def test_tokens_decode_to_the_documents_of_each_split(tmp_path: Path) -> None:
    manifest = build_dataset(section(tmp_path, write_texts(tmp_path / "texts")))
    for split, wanted in (("train", False), ("validation", True)):
        expected = [text for text in TEXTS if held_out(text) == wanted]
        assert decoded(tmp_path / "set", split) == expected
        assert manifest.splits[split]["documents"] == len(expected) > 0
        assert manifest.splits[split]["bin_bytes"] == 2 * manifest.splits[split]["tokens"]  # uint16
    assert read_manifest(tmp_path / "set") == manifest


def test_jsonl_and_parquet_give_the_dataset_of_the_text_files(tmp_path: Path) -> None:
    build_dataset(section(tmp_path, write_texts(tmp_path / "texts"), "plain"))
    rows = [{"id": number, "body": text} for number, text in enumerate([*TEXTS, ""])]
    lines = tmp_path / "rows [1].jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    build_dataset(section(tmp_path, lines, "lines", text_field="body"))
    build_dataset(section(tmp_path, tmp_path / "rows.parquet", "parquet", text_field="body"))
    plain = contents(tmp_path / "plain")
    del plain["manifest.json"]
    for name in ("lines", "parquet"):
        other = contents(tmp_path / name)
        del other["manifest.json"]
        assert other == plain


def test_stdlib_source_is_this_interpreter_without_tests() -> None:
    assert any("class OrderedDict" in text for text, _ in open_source("stdlib", "text").read())
    with open(json.__file__, encoding="utf-8") as file:
        module = file.read()
    assert any(module == text for text, _ in open_source("stdlib", "text").read())


def test_second_build_is_skipped_and_another_request_needs_force(tmp_path: Path, capsys) -> None:
    source = write_texts(tmp_path / "texts")
    first = build_dataset(section(tmp_path, source))
    stamp = (tmp_path / "set" / "train.bin").stat().st_mtime_ns
    assert build_dataset(section(tmp_path, source)) == first
    assert "up to date" in capsys.readouterr().err
    assert (tmp_path / "set" / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"vocab_size: 400 -> 300.*--force"):
        build_dataset(section(tmp_path, source, vocab_size=300))
    (source / "new.txt").write_text("one more")
    with pytest.raises(UserError, match=r"sources: .*60 files.*61 files.*--force"):
        build_dataset(section(tmp_path, source))
    assert build_dataset(section(tmp_path, source, vocab_size=300), force=True).vocab_size == 300


def test_a_given_tokenizer_keeps_its_vocabulary_and_end_token(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts")
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    (tmp_path / "given").mkdir()
    tokenizer.save(str(tmp_path / "given" / "tokenizer.json"))
    (tmp_path / "given" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    manifest = build_dataset(section(tmp_path, source, tokenizer=str(tmp_path / "given")))
    assert (manifest.vocab_size, manifest.end_of_document_id) == (301, 300)  # added tokens count
    plain = load_tokenizer(str(tmp_path / "set"))
    texts = [text for text in TEXTS if not held_out(text)]
    for ids, text in zip(sequences(tmp_path / "set", "train"), texts, strict=True):
        assert plain.decode(ids[:-1].tolist(), skip_special_tokens=False) == text and ids[-1] == 300


@pytest.mark.parametrize(("built", "later"), [(None, "<stop>"), ("<stop>", None)])
def test_another_end_of_document_token_is_another_setting(
    built: str | None, later: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token that the vocabulary gives by itself is not recorded, as in datasets of earlier versions."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer, configured = train_tokenizer(TEXTS, 300), folder / "tokenizer_config.json"
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "manifest.json").write_text("{}")  # of an exported model, not of a dataset
    data = section(tmp_path, write_texts(tmp_path / "texts"), tokenizer=str(folder))
    configured.write_text(json.dumps({"eos_token": built}))
    assert build_dataset(data).request.get("end_of_document_token") == built
    build_dataset(data)
    assert "up to date" in capsys.readouterr().err
    configured.write_text(json.dumps({"eos_token": later}))
    usual = "<|endoftext|>"
    changed = re.escape(f"end_of_document_token: {built or usual} -> {later or usual}")
    with pytest.raises(UserError, match=f"{changed}.*--force"):
        build_dataset(data)


def broken(tmp_path: Path, name: str, text: bytes) -> Path:
    (tmp_path / name).write_bytes(text)
    return tmp_path / name


def test_a_renamed_file_is_another_setting_and_what_is_read_twice_is_said(tmp_path: Path, capsys) -> None:
    source = write_texts(tmp_path / "texts")
    data = section(tmp_path, source)
    build_dataset(data)
    first = sorted(source.iterdir())[0]
    first.rename(first.with_name("zz.txt"))
    with pytest.raises(UserError, match=r"bytes\) -> as many, with other names or sizes\); choose"):
        build_dataset(data)
    (tmp_path / "link").symlink_to(source)
    capsys.readouterr()
    build_dataset(replace(data, sources=[str(source / "zz.txt"), str(tmp_path / "link")]), force=True)
    assert f"'{source / 'zz.txt'}' is inside '{tmp_path / 'link'}', so its documents" in capsys.readouterr().err


class Listed(PurePosixPath):
    def stat(self) -> Any:
        return SimpleNamespace(st_size=1)


def test_names_are_hashed_and_sorted_alike_in_every_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listing(encoding: str) -> str:
        monkeypatch.setattr(os, "fsencode", lambda name: str(name).encode(encoding))
        source = FileSource(str(tmp_path), "text")
        names = (name.encode().decode(encoding) for name in ("größe", "größer", "a-b", "世", "𝒇"))
        source._files = sorted((Listed(tmp_path, name) for name in names), key=_in_order)  # type: ignore[arg-type]
        return source.describe()["listing"]

    assert listing("utf-8") == listing("latin-1")


def test_errors_of_sources_say_what_to_do(tmp_path: Path) -> None:
    lines = broken(tmp_path, "good.jsonl", b'{"text": "a", "title": "b"}\n')
    cases = [
        (str(tmp_path / "goud.jsonl"), "text", f"did you mean '{lines}'.*hf:NAME"),
        ("stdlip", "text", "did you mean 'stdlib'"),
        (str(lines), "txt", "did you mean 'text'.*its columns: text, title"),
        (
            str(broken(tmp_path, "bad.jsonl", b'{"text": "a"}\n{"text": \n')),
            "text",
            "line 2 of .*bad.jsonl is not JSON",
        ),
        (
            str(broken(tmp_path, "cut.jsonl", b'{"text": "a"}\n{"text": "b')),
            "text",
            "line 2 of .*cut.jsonl is not JSON",
        ),
        (str(broken(tmp_path, "bad.parquet", b"PAR1 but not really")), "text", "could not read .*bad.parquet"),
        (str(broken(tmp_path, "number.jsonl", b'{"text": 3}\n')), "text", "has type int in this column, not text"),
        (str(broken(tmp_path, "latin.txt", b"caf\xe9")), "text", "latin.txt is not UTF-8 text"),
    ]
    for source, text_field, message in cases:
        with pytest.raises(UserError, match=message):
            build_dataset(section(tmp_path, source, text_field=text_field))
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".*"))


def test_binary_files_in_a_folder_are_skipped(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts")
    (source / "picture.png").write_bytes(b"\x89PNG\xff")
    assert [text for text, _ in open_source(str(source), "text").read()] == TEXTS


def test_an_empty_corpus_or_split_is_refused(tmp_path: Path) -> None:
    def no_text(source: Path, found: str) -> None:
        with pytest.raises(UserError, match=f"contain no text{found}; name UTF-8 text, JSON Lines or Parquet"):
            build_dataset(section(tmp_path, source))

    no_text(broken(tmp_path, "empty.txt", b""), ", only 1 document without text")
    folder = tmp_path / "folder"
    folder.mkdir()
    no_text(folder, ": they have no files or rows")
    broken(folder, "latin.txt", b"caf\xe9")
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    no_text(folder, ", only 1 file that is not UTF-8 text, 1 link to nothing")
    broken(folder, "packed.txt.gz", gzip.compress(b"text"))
    no_text(folder, ", only 2 files that are not UTF-8 text, 1 link to nothing")
    with pytest.raises(UserError, match=r"split is empty.*validation_fraction"):
        build_dataset(section(tmp_path, broken(tmp_path, "one.txt", b"one")))


def test_of_a_few_documents_some_are_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = section(tmp_path, write_texts(tmp_path / "texts"), validation_fraction=1e-9)
    splits = build_dataset(settings).splits
    assert all(splits[split]["documents"] > 0 for split in ("train", "validation"))
    assert "would have held out no document: a larger share is held out" in capsys.readouterr().err
    first = contents(tmp_path / "set")
    build_dataset(settings, force=True)
    assert contents(tmp_path / "set") == first


def test_full_disk_keeps_the_old_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_texts(tmp_path / "texts")
    build_dataset(section(tmp_path, source))
    before = contents(tmp_path / "set")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexedDatasetBuilder, "add_document", full)
    with pytest.raises(UserError, match=r"no space left while writing .*set \(\d+ MB free\); .*data.path"):
        build_dataset(section(tmp_path, source, vocab_size=300), force=True)
    assert contents(tmp_path / "set") == before
    assert not list(tmp_path.glob(".*"))


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts")
    with pytest.raises(UserError, match=r"is not a dataset: it contains other files \(000.txt"):
        build_dataset(section(tmp_path, source, "texts"), force=True)
    assert len(list(source.iterdir())) == len(TEXTS)


def test_a_dataset_is_not_built_inside_of_its_source(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "texts")
    with pytest.raises(UserError, match=r"is inside the source '.*texts', and the next build would read"):
        build_dataset(section(tmp_path, source, "texts/data/set"))
    build_dataset(section(tmp_path, source, "texts/.data/set"))  # names that begin with a dot are not read


def test_damaged_datasets_are_refused(tmp_path: Path) -> None:
    data = section(tmp_path, write_texts(tmp_path / "texts"))
    folder = tmp_path / "set"
    with pytest.raises(UserError, match="does not exist; build it with: mosa data build"):
        read_manifest(folder)
    build_dataset(data)
    size = (folder / "train.bin").stat().st_size
    os.truncate(folder / "train.bin", size - 2)
    with pytest.raises(
        UserError, match=f"train.bin has {size - 2} bytes instead of {size}; restore it from a copy, or rebuild"
    ):
        build_dataset(data)  # the same request, but the dataset is unusable
    build_dataset(data, force=True)
    (folder / "validation.idx").unlink()
    with pytest.raises(UserError, match=r"validation.idx is missing"):
        read_manifest(folder)
    build_dataset(data, force=True)
    train_tokenizer(TEXTS, 300).save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="tokenizer.json is damaged or was replaced since .*: .*restore it"):
        read_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(UserError, match="format version 2"):
        read_manifest(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="could not read .*manifest.json"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "model",
    [
        models.Unigram([("</s>", 0.0), ("a", -1.0)]),
        models.WordLevel({"</s>": 0, "a": 1}, unk_token="<unk>"),
        models.WordPiece({"</s>": 0, "a": 1}, unk_token="<unk>"),
        models.BPE({"</s>": 0, "a": 1}, [], unk_token="<unk>"),
    ],
)
def test_a_tokenizer_that_fails_at_unknown_characters_is_refused(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    Tokenizer(model).save(str(file))
    data = section(tmp_path, broken(tmp_path, "a.txt", b"a"), tokenizer=str(file))
    with pytest.raises(UserError, match=r"data.tokenizer='.*json' fails at characters .*: .*; name a token") as caught:
        build_dataset(data)
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"tokenizer.json", "a.txt"}


def test_a_tokenizer_is_the_same_under_any_spelling_of_its_path(tmp_path: Path, capsys) -> None:
    source = write_texts(tmp_path / "texts")
    build_dataset(section(tmp_path, source, "first"))
    file = tmp_path / "given" / "tokenizer.json"
    file.parent.mkdir()
    shutil.copy(tmp_path / "first" / "tokenizer.json", file)
    build_dataset(section(tmp_path, source, tokenizer=str(file)))
    for spelling in (file.parent, f"{tmp_path}/./given/tokenizer.json"):
        data = section(tmp_path, source, tokenizer=str(spelling))
        build_dataset(data)
        assert "up to date" in capsys.readouterr().err
        check_tokenizer(data, open_mixture(data))
    train_tokenizer(TEXTS, 290).save(str(file))
    with pytest.raises(UserError, match="was built with another tokenizer: .*; rebuild it"):
        check_tokenizer(data, open_mixture(data))


def test_errors_of_tokenizers_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be at least 257 .*, got 256"):
        train_tokenizer(TEXTS, 256)
    with pytest.raises(UserError, match="missing.json does not exist"):
        load_tokenizer(str(tmp_path / "missing.json"))
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"is not a valid tokenizer.json"):
        load_tokenizer(str(broken(tmp_path, "tokenizer.json", b"{}")))
    with pytest.raises(UserError, match="has none of the end-of-document tokens"):
        end_of_document_id(Tokenizer.from_str(train_tokenizer(TEXTS, 300).to_str().replace("<|endoftext|>", "<x>")))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json names '<\|eot_id\|>' as eos_token, which the vocabulary"
    ):
        end_of_document_id(train_tokenizer(TEXTS, 300), tmp_path / "tokenizer.json")


@pytest.mark.parametrize("naming", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_has_one_encoding_and_one_end_token_by_path_and_by_name(
    naming: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache is that of a machine without network; dropout of merges would give other ids each time.

    A build that was interrupted continues without the cache.
    """
    snapshot = tmp_path / "hub" / "models--org--tok" / "snapshots" / ("0" * 40)
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.model.dropout = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    for folder in (snapshot, tmp_path / "folder"):
        folder.mkdir(parents=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / naming).write_text('{"eos_token": "<stop>"}')
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = write_texts(tmp_path / "texts")
    by_name, by_path = (section(tmp_path, source, tokenizer=name) for name in ("org/tok", str(tmp_path / "folder")))

    def built(data: DataSection) -> tuple[Any, ...]:
        manifest = build_dataset(data, force=True)
        return manifest.end_of_document_id, manifest.encoding_hash, (tmp_path / "set" / "train.bin").read_bytes()

    expected = built(by_path)
    assert expected[0] == 300 and built(by_name) == expected
    shutil.rmtree(tmp_path / "set")
    with monkeypatch.context() as patch, pytest.raises(SourceInterruptedError):
        patch.setattr(build, "write_shards", Mock(side_effect=SourceInterruptedError("stopped")))
        build_dataset(by_name)
    shutil.rmtree(tmp_path / "hub")
    manifest = build_dataset(by_name)
    assert (manifest.end_of_document_id, manifest.encoding_hash) == expected[:2]
    assert (tmp_path / "set" / "train.bin").read_bytes() == expected[2]
