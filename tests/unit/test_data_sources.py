"""Sources: only the text is read, and every document or character that is left out is counted."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from megatron_mosa.config.schema import DataSection
from megatron_mosa.data import build_dataset, iter_documents, load_tokenizer, shards, train_tokenizer
from megatron_mosa.data.encoder import Encoder
from megatron_mosa.data.json_rows import json_rows
from megatron_mosa.data.left_out import (
    ALREADY_READ,
    BROKEN_LINKS,
    EARLY_ENDS,
    EMPTY,
    HIDDEN,
    LOST,
    NOT_UTF8,
    SURROGATES,
    UNKNOWN,
)
from megatron_mosa.data.sources import open_source
from megatron_mosa.data.tokenizer import knows_every_character
from megatron_mosa.errors import UserError

LONG = "lorem ipsum dolor sit amet " * 400
# Fields of rows beside the text, in the first 11 MB and after them.
FIELDS = {
    "a late key": ({}, {"lang": "en"}),
    "an integer, then a fraction": ({"s": 1}, {"s": 0.5}),
    "nothing, then text": ({"t": None}, {"t": "x"}),
    "a date, then text": ({"d": "2019-04-25T12:57:54Z"}, {"d": "unknown"}),
    "objects of other keys": ({"m": {"a": 1}}, {"m": {"b": "x"}}),
    "an object, then a list": ({"m": {"a": 1}}, {"m": [1]}),
    "an empty list, then text": ({"l": []}, {"l": ["x"]}),
    "an integer too large for 64 bits": ({"i": 1}, {"i": 2**70}),
}


def documents(source: Path | str, text_field: str = "text") -> list[str]:
    return list(iter_documents([str(source)], text_field))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("form", ["file", "hub"])
def test_other_fields_may_contain_anything(form: str, tmp_path: Path) -> None:
    first, later = ({key: value for fields in FIELDS.values() for key, value in fields[n].items()} for n in (0, 1))
    texts = [f"{number} {LONG}" for number in range(1105)]
    rows = [{"text": text, **(first if number < 1100 else later)} for number, text in enumerate(texts)]
    file = write_rows(tmp_path / "hub" / "rows.jsonl", rows)
    assert documents(file if form == "file" else f"hf:{file.parent}") == texts


def test_checksums_of_parquet_pages_are_verified(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"text": f"document {number}"} for number in range(100)])
    file = tmp_path / "rows.parquet"
    parquet.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
    assert len(documents(file)) == 100
    content = bytearray(file.read_bytes())
    content[content.index(b"document 50")] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"could not read {file}: .*CRC.*; repair or remove the file"):
        documents(file)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_number_too_long_for_python_is_no_obstacle(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"rows.{suffix}").write_text(f'{{"text": "a", "n": {"1" * 5000}}}\n{{"text": "b"}}\n')
    assert documents(tmp_path / f"rows.{suffix}") == ["a", "b"]


def test_text_that_looks_like_something_else_stays_text(tmp_path: Path) -> None:
    texts = ["2019-04-25", "1e5", "true", "null", "NaN", "0x1F", " "]
    rows = [{"text": text} for text in texts]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert documents(write_rows(tmp_path / "rows.jsonl", rows)) == texts
    assert documents(f"hf:{write_rows(tmp_path / 'hub' / 'rows.jsonl', rows).parent}") == texts
    assert documents(tmp_path / "rows.parquet") == texts


@pytest.mark.parametrize(
    ("name", "opener"),
    [("a.jsonl", open), ("a.jsonl.gz", gzip.open), ("a.ndjson.bz2", bz2.open), ("a.jsonl.xz", lzma.open)],
)
def test_compressed_lines(name: str, opener: Callable[..., Any], tmp_path: Path) -> None:
    with opener(tmp_path / name, "wb") as file:
        file.write(
            b'\xef\xbb\xbf{"text": "one"}\r\n\n  {"text": "t\\u0000wo\xe2\x80\xa8\xc2\x85", "k": 1, "k": 2}\n'
            b'{"text": "three"}'
        )
    assert documents(tmp_path / name) == ["one", "t\0wo\u2028\x85", "three"]


def test_zstd(tmp_path: Path) -> None:
    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as file:
        file.write(b'{"text": "one"}\n{"text": "two"}\n')
    assert documents(tmp_path / "a.jsonl.zst") == ["one", "two"]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_nothing_behind_a_compressed_stream_is_ignored(suffix: str, tmp_path: Path) -> None:
    compress: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    first, second = (
        compress.get(suffix, lambda row: pa.compress(row, "zstd", asbytes=True))(b'{"text": "%s"}\n' % text)
        for text in (b"one", b"two")
    )
    file = tmp_path / f"a.jsonl.{suffix}"
    file.write_bytes(first + second)
    assert documents(file) == ["one", "two"]
    damaged = bytes([second[0] ^ 1]) + second[1:]
    for content in (first + damaged, first + b"no stream", first + second[:-1], first + second[:2], damaged):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"could not read {file}: .*; repair or remove the file"):
            documents(file)


def test_padding_of_xz_streams_is_skipped(tmp_path: Path) -> None:
    first, second = (lzma.compress(b'{"text": "%s"}\n' % text) for text in (b"one", b"two"))
    file = tmp_path / "a.jsonl.xz"
    for zeros in (4, 200_000):
        file.write_bytes(first + bytes(zeros) + second + bytes(zeros))
        assert documents(file) == ["one", "two"]
    file.write_bytes(first + bytes(5) + second)
    with pytest.raises(UserError, match="not a multiple of four bytes"):
        documents(file)


@pytest.mark.parametrize(
    "layout",
    [
        lambda rows: json.dumps(rows),
        lambda rows: json.dumps(rows, indent=2),
        lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
        lambda rows: "\n".join(map(json.dumps, rows)),
        lambda rows: "\ufeff" + "".join(map(json.dumps, rows)),
    ],
)
def test_json_in_any_layout(
    layout: Callable[[list[Any]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mosa.data.json_rows._CHUNK", 7)  # cuts every value
    texts = ["a", "ünïcödé \U0001f600", 'quoted "]}, {[" text', "", "last\n"]
    (tmp_path / "a.json").write_text(
        layout([{"n": -1.5e3, "text": text, "deep": [{"text": [1]}]} for text in texts]), encoding="utf-8"
    )
    assert documents(tmp_path / "a.json") == [text for text in texts if text]
    position = list(open_source(str(tmp_path / "a.json"), "text").read())[1][1]
    assert [text for text, _ in open_source(str(tmp_path / "a.json"), "text").read(position)] == texts[2:3] + texts[4:]


def test_an_array_takes_about_the_time_of_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mosa.data.json_rows._CHUNK", 1 << 30)  # a copy of the rest for every value is noticed
    rows, seconds = [json.dumps({"text": "x" * 60, "id": number}) for number in range(30000)], []
    for text, is_lines in (("\n".join(rows), True), (f"[{','.join(rows)}]", False)):
        start = time.process_time()
        assert sum(1 for _ in json_rows(io.BytesIO(text.encode()), "rows", is_lines=is_lines)) == len(rows)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 10 * seconds[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"line 3 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', r"line 2 of .*a.jsonl is \[1, 2\], not an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"line 2 of .*a.jsonl is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": {"b": 1}}\n', r"line 2 of .*a.jsonl has type dict in this column"),
        ("a.json", b"{}", r"'text' is not a column of .*; it has no columns; keep the file out of the source"),
        ("a.jsonl", b'{"txt": "a"}\n{"title": "b"}\n', r"'text' is not a column of .*did you mean 'txt'.*: txt, title"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, r"line 2 of .*a.jsonl is not JSON"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]', r"line 3 of .*a.json is not JSON .*comma"),
        ("a.json", b'[{"text": "a"},\n{"text": "b', r"line 2 of .*a.json is not JSON"),
        ("a.json", b'[{"text": "a"}', r"line 1 of .*a.json is not JSON .*does not end"),
        ("a.json", b'{"text": "a"}\n\n nonsense' + b" " * 99, r"line 3 of .*a.json is not JSON"),
        ("a.json", b'{"text": "a"}\n{"text": "b",\n"n": nonsense' + b" " * 99, r"line 3 of .*a.json is not JSON"),
        ("a.json", b'{"text": "a"}\n{"text": "\xff"}', r"line 2 of .*a.json is not UTF-8"),
        ("a.jsonl.gz", b"not gzip at all", r"could not read .*a.jsonl.gz"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_number_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike an object, a number that is cut off is also valid JSON."""
    monkeypatch.setattr("megatron_mosa.data.json_rows._CHUNK", 7)
    (tmp_path / "a.json").write_text('{"text": "a"}\n1234567890', encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2 of .*a.json is 1234567890, not an object"):
        documents(tmp_path / "a.json")


def test_a_bad_line_of_a_hub_dataset_is_named(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "hub" / "a.jsonl", [{"text": "a"}])
    file.write_text(file.read_text(encoding="utf-8") + '{"text": \n', encoding="utf-8")
    with pytest.raises(UserError, match="row 2 of hf:.* is not JSON"):
        documents(f"hf:{file.parent}")


def test_rows_without_text_are_counted_wherever_they_are(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 1},
        {"id": 2, "text": None},
        {"text": "a"},
        {"text": ""},
        {"id": 3},
        {"text": "b"},
        {"id": 4},
    ]
    for source in (write_rows(tmp_path / "hub" / "a.jsonl", rows), f"hf:{tmp_path / 'hub'}"):
        opened = open_source(str(source), "text")
        texts, positions = zip(*opened.read(), strict=True)
        assert texts == ("a", "b") and opened.left_out == {EMPTY: 5}
        assert [[text for text, _ in opened.read(position)] for position in positions] == [["b"], []]


def test_half_of_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "cut \\ud83d here"}\n{"text": "whole \\ud83d\\ude00"}\n', encoding="utf-8"
    )
    source = open_source(str(tmp_path / "a.jsonl"), "text")
    assert [text for text, _ in source.read()] == ["cut \ufffd here", "whole \U0001f600"]
    assert source.left_out == {SURROGATES: 1}


def test_everything_in_a_folder_is_read_or_counted(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "books", corpus / ".cache", elsewhere / "web" / "deep"):
        folder.mkdir(parents=True)
    for number, file in enumerate(
        (corpus / "books" / "1.txt", elsewhere / "web" / "2.txt", elsewhere / "web" / "deep" / "3.txt")
    ):
        file.write_text(f"text {number}", encoding="utf-8")
    (corpus / "books" / "bom.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (corpus / "books" / "empty.txt").touch()
    (corpus / "books" / ".hidden.txt").write_text("hidden", encoding="utf-8")
    (corpus / "books" / "picture.png").write_bytes(b"\x89PNG\xff")
    (corpus / "web").symlink_to(elsewhere / "web")
    (corpus / "web again").symlink_to(elsewhere / "web")
    (elsewhere / "web" / "deep" / "round").symlink_to(corpus)
    (corpus / "nowhere").symlink_to(tmp_path / "gone")
    (corpus / "linked.txt").symlink_to(elsewhere / "web" / "2.txt")
    os.mkfifo(corpus / "pipe")  # would block if it were opened
    source = open_source(str(corpus), "text")
    assert Counter(text for text, _ in source.read()) == {"text 0": 1, "text 1": 2, "text 2": 1, "with a mark": 1}
    assert source.left_out == {EMPTY: 1, NOT_UTF8: 1, HIDDEN: 2, BROKEN_LINKS: 1, ALREADY_READ: 2}


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refuse(folder: Any) -> Any:  # instead of permissions, which do not stop root
        if str(folder).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"could not read .*closed: Permission denied"):
        documents(tmp_path)


def of_characters(unknown: str | None) -> Tokenizer:
    """Create a tokenizer that knows the characters a to z, and a token for all others if ``unknown`` names one."""
    names = ["</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


@pytest.mark.parametrize(("unknown", "expected"), [(None, {LOST: 5}), ("<unk>", {UNKNOWN: 5})])
def test_characters_that_a_tokenizer_does_not_know_are_counted(
    unknown: str | None, expected: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_characters(unknown).save(str(tmp_path / "tokenizer.json"))
    write_rows(
        tmp_path / "a.jsonl", [{"text": "only 世界 words Ж 17"}, *({"text": f"word {chr(97 + n)}"} for n in range(20))]
    )
    data = DataSection(
        path=str(tmp_path / "set"), sources=[str(tmp_path / "a.jsonl")], tokenizer=str(tmp_path / "tokenizer.json"),
        validation_fraction=0.3,
    )  # fmt: skip
    assert build_dataset(data).left_out == expected
    (what,) = expected
    assert f"left out or changed: 5 {what}" in capsys.readouterr().err


@pytest.mark.parametrize("splitter", [pre_tokenizers.Whitespace(), pre_tokenizers.Metaspace()])
def test_lost_characters_are_those_that_no_token_covers(splitter: Any) -> None:
    """Compare with a count character by character, including all white space and the highest code points."""
    tokenizer = of_characters(None)
    tokenizer.pre_tokenizer = splitter
    blanks = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    texts = [
        "",
        "abc",
        "\0",
        "世",
        "".join(blanks),
        f"a世{'b'.join(blanks)}\u3001\u3002\ufeff\u200b",
        "a" + "\U0010ffff" * 3,
    ]
    texts += ["".join(chr(97 + n * m % 31) + blanks[n * m % len(blanks)] for n in range(200)) for m in (1, 7)]
    for text, encoded in zip(texts, Encoder(tokenizer, 0, int, 0.0).encode(texts), strict=True):  # type: ignore[arg-type]
        covered = {index for start, end in tokenizer.encode(text).offsets for index in range(start, end)}
        lost = [character for index, character in enumerate(text) if index not in covered and not character.isspace()]
        assert encoded.lost == (Counter({LOST: len(lost)}) if lost else Counter()), text


@pytest.mark.parametrize(
    ("normalizer", "splitter", "lost"),
    [
        (None, pre_tokenizers.Split(Regex(r"\d+"), "removed"), 4),
        (normalizers.Replace(",", ""), None, 1),
        (normalizers.NFC(), None, 0),  # it joins the accent with its letter
    ],
)
def test_what_a_byte_level_tokenizer_removes_is_counted(normalizer: Any, splitter: Any, lost: int) -> None:
    tokenizer = train_tokenizer(["words"], 257)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, tokenizer.pre_tokenizer])  # pyright: ignore
    (encoded,) = Encoder(tokenizer, 0, int, 0.0).encode(["cafe\u0301 1,234"])  # type: ignore[arg-type]
    assert encoded.lost[LOST] == lost


WORDS = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}


@pytest.mark.parametrize(
    ("model", "lost"),
    [
        (models.Unigram([(word, float(-number)) for word, number in WORDS.items()], 0), {EARLY_ENDS: 1, UNKNOWN: 2}),
        (models.WordLevel(WORDS, unk_token="<unk>"), {EARLY_ENDS: 1, UNKNOWN: 2}),
        (models.WordLevel(WORDS, unk_token="</s>"), {EARLY_ENDS: 3}),
    ],
)
def test_only_the_end_of_a_document_has_its_token(model: Any, lost: dict[str, int]) -> None:
    """These models have its name as an ordinary word, or it as the unknown token."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    (encoded,) = Encoder(tokenizer, 1, np.uint16, 0.0).encode(["a </s> 世 b 界"])
    assert encoded.ids.tolist() == ([2, 0, 3, 0, 1] if UNKNOWN in lost else [2, 3, 1])
    assert encoded.lost == lost and encoded.ids.dtype == np.uint16


def test_byte_level_tokenizers_lose_nothing() -> None:
    plain = train_tokenizer(["some text"], 300)
    assert knows_every_character(plain)
    assert not knows_every_character(of_characters(None)) and not knows_every_character(of_characters("<unk>"))
    names = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz"]
    with_bytes = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, [], byte_fallback=True))
    assert knows_every_character(with_bytes)
    (encoded,) = Encoder(with_bytes, 0, int, 0.0).encode(["ab 世"])  # type: ignore[arg-type]
    assert not encoded.lost and len(encoded.ids) == 2 + 1 + 3 + 1


def test_a_smaller_vocabulary_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"short {chr(97 + number)}"} for number in range(20)]
    source = str(write_rows(tmp_path / "a.jsonl", rows))
    manifest = build_dataset(
        DataSection(path=str(tmp_path / "set"), sources=[source], vocab_size=5000, validation_fraction=0.3)
    )
    assert manifest.vocab_size < 300
    assert "vocabulary below data.vocab_size=5000" in capsys.readouterr().err


def test_counts_do_not_depend_on_shard_boundaries(tmp_path: Path) -> None:
    rows = [{"text": "" if number % 3 == 0 else f"document {number} " * 20} for number in range(60)]
    source = str(write_rows(tmp_path / "corpus" / "a.jsonl", rows).parent)
    (tmp_path / "corpus" / ".hidden").touch()
    found = [
        build_dataset(
            DataSection(
                path=str(tmp_path / f"{size}"),
                sources=[source],
                vocab_size=300,
                validation_fraction=0.3,
                shard_bytes=size,
            )
        ).left_out
        for size in (1, 1000, 10**9)
    ]
    assert found == [{EMPTY: 20, HIDDEN: 1}] * 3
    assert load_tokenizer(str(tmp_path / "1"))


@pytest.mark.parametrize("finished", [0, 1, 5])
def test_counts_do_not_depend_on_interruptions(finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "" if number % 3 == 0 else f"document {number} " * 20} for number in range(60)]
    source = str(write_rows(tmp_path / "corpus" / "a.jsonl", rows).parent)
    (tmp_path / "corpus" / ".hidden").touch()
    data = DataSection(
        path=str(tmp_path / "set"), sources=[source], vocab_size=300, validation_fraction=0.3, shard_bytes=1000
    )
    write, records = shards.write_atomically, []

    def write_some(file: Path, *content: Any, **options: Any) -> Any:
        if len(records) == finished:
            raise KeyboardInterrupt
        records.append(file)
        return write(file, *content, **options)

    with monkeypatch.context() as context:
        context.setattr(shards, "write_atomically", write_some)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(data)
    assert build_dataset(data).left_out == {EMPTY: 20, HIDDEN: 1}
