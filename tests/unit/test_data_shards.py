"""Builds that were killed or interrupted continue to the same bytes as an uninterrupted build."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer

from megatron_mosa.config.schema import DataSection
from megatron_mosa.data import build, build_dataset, shards, train_tokenizer
from megatron_mosa.data.encoder import in_validation
from megatron_mosa.data.sources import open_source
from megatron_mosa.errors import UserError
from tests.disk import Disk
from tests.loaded import loaded_python

FRACTION = 0.3
SHARD = 2000  # bytes, about three documents
FILES = ["manifest.json", "tokenizer.json", "train.bin", "train.idx", "validation.bin", "validation.idx"]


def text(number: int) -> str:
    return f"Document {number}: " + " ".join(f"wörd{number * j % 23}\r\n" for j in range(60))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write text files, JSON Lines with empty rows, and a local Hugging Face dataset of two files."""
    root = tmp_path_factory.mktemp("sources")
    (root / "texts").mkdir()
    for number in range(12):
        (root / "texts" / f"{number:02}.txt").write_bytes(text(number).encode())
    (root / "texts" / "99.txt").write_text("")
    write_rows(root / "rows.jsonl", [text(100), "", text(101), text(102), None, *map(text, range(103, 112))])
    (root / "hub").mkdir()
    write_rows(root / "hub" / "train-0.jsonl", [*map(text, range(200, 210)), ""])
    write_rows(root / "hub" / "train-1.jsonl", list(map(text, range(210, 216))))
    return [str(root / "texts"), str(root / "rows.jsonl"), f"hf:{root / 'hub'}"]


def write_rows(file: Path, texts: list[str | None]) -> None:
    file.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))


def section(path: Path, sources: list[str], **changes: Any) -> DataSection:
    settings = {"vocab_size": 400, "validation_fraction": FRACTION, "shard_bytes": SHARD} | changes
    return DataSection(path=str(path), sources=sources, **settings)


def documents(sources: list[str]) -> list[str]:
    return [document for source in sources for document, _ in open_source(source, "text").read()]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


@pytest.fixture(scope="module")
def undisturbed(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "set"
    build_dataset(section(folder, sources))
    assert list(contents(folder)) == FILES
    return contents(folder)


def test_joined_shards_equal_the_output_of_one_builder(
    sources: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_str(undisturbed["tokenizer.json"].decode())
    end = tokenizer.token_to_id("<|endoftext|>")
    for split in ("train", "validation"):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{split}.bin"), dtype=np.uint16)
        for document in documents(sources):
            if in_validation(document.encode(), FRACTION) == (split == "validation"):
                ids = [*tokenizer.encode(document).ids, end]
                builder.add_document(np.array(ids), [len(ids)])  # pyright: ignore[reportArgumentType]
        builder.finalize(str(tmp_path / f"{split}.idx"))
        for suffix in ("bin", "idx"):
            assert (tmp_path / f"{split}.{suffix}").read_bytes() == undisturbed[f"{split}.{suffix}"]


@pytest.mark.parametrize("shard_bytes", [1, 7000, 10**9])
def test_shard_boundaries_have_no_influence(
    shard_bytes: int, sources: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    build_dataset(section(tmp_path / "set", sources, shard_bytes=shard_bytes))
    assert contents(tmp_path / "set") == undisturbed


def test_downloaded_sources_give_the_same_tokens(
    sources: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    build_dataset(section(tmp_path / "set", sources, streaming=False))
    assert contents(tmp_path / "set") == undisturbed


# The function, the number of the call at which the process dies, and whether before or after the call.
MOMENTS = [
    ("build.write_atomically", 2, "after"),  # the tokenizer is written
    ("IndexedDatasetBuilder.add_document", 20, "before"),  # in the middle of a shard
    ("shards.write_atomically", 1, "before"),  # a shard without its record
    ("shards.write_atomically", 1, "after"),
    ("shards.write_atomically", 8, "after"),  # in the second source
    ("shards.write_atomically", 12, "after"),  # in the third
    ("shards._join_index", 1, "before"),
    ("build.write_atomically", 3, "before"),  # all files except the manifest
    ("build.write_atomically", 3, "after"),
    ("os.rename", 1, "before"),
    ("os.rename", 1, "after"),
]

# One process imports everything and forks before starting threads: one child dies, the next one continues its build.
KILLER = """
import contextlib, os, signal, sys
with contextlib.suppress(ImportError):
    import scipy.io  # datasets imports it when it first reads
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron_mosa.config.schema import DataSection
from megatron_mosa.data import build, shards

settings, moments = {settings!r}, {moments!r}

def deadly(function, call, when):
    calls = 0
    def wrapped(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **named)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

def forbidden(*arguments, **named):
    raise AssertionError("trained the tokenizer again")

def child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for number, (name, call, when) in enumerate(moments):
    data = DataSection(path=f"{folder}/{{number}}", **settings)
    def die():
        holder, attribute = name.split(".")
        setattr(globals()[holder], attribute, deadly(getattr(globals()[holder], attribute), call, when))
        build.build_dataset(data)
    def resume():
        build.train_tokenizer = forbidden
        build.build_dataset(data)
    print(child(die), child(resume), flush=True)
"""


def test_a_killed_build_continues_to_the_same_bytes(
    sources: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    settings = {"sources": sources, "vocab_size": 400, "validation_fraction": FRACTION, "shard_bytes": SHARD}
    code = KILLER.format(settings=settings, moments=MOMENTS, folder=tmp_path)
    done = subprocess.run([loaded_python(), "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    outcomes = [line for line in done.stdout.splitlines() if line]  # training the tokenizer prints empty lines
    assert outcomes == ["-9 0"] * len(MOMENTS), done.stderr[-2000:]
    for number in range(len(MOMENTS)):
        assert contents(tmp_path / str(number)) == undisturbed, MOMENTS[number]
    assert not list(tmp_path.glob(".*"))


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Interrupt the build, as Ctrl-C does, after ``count`` finished shards."""
    write_atomically = shards.write_atomically
    left = iter(range(count))

    def interrupt(file: Path, content: str, **options: bool) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write_atomically(file, content, **options)

    monkeypatch.setattr(shards, "write_atomically", interrupt)


def interrupted(monkeypatch: pytest.MonkeyPatch, data: DataSection, count: int) -> None:
    with monkeypatch.context() as context:
        stop_after(context, count)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(data)


def test_finished_shards_are_not_tokenized_again(
    sources: list[str], undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = section(tmp_path / "set", sources)
    interrupted(monkeypatch, data, 10)
    records = sorted(partial(tmp_path / "set").glob("shard-*.json"))
    finished = sum(c["documents"] for r in records for c in json.loads(r.read_text())["splits"].values())
    assert len(records) == 10 and finished > 20
    seen = []
    encode = shards.Encoder.encode
    monkeypatch.setattr(shards.Encoder, "encode", lambda self, texts: [seen.extend(texts), encode(self, texts)][1])
    build_dataset(data)
    assert len(seen) == len(documents(sources)) - finished
    assert contents(tmp_path / "set") == undisturbed


@pytest.mark.parametrize("change", ["size", "time", "first bytes", "last bytes"])
def test_a_changed_source_of_a_finished_shard_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text(number) * 20)
    data = section(tmp_path / "set", [str(tmp_path / "texts")], shard_bytes=60000)
    interrupted(monkeypatch, data, 2)
    file = tmp_path / "texts" / "07.txt"
    stamp, content = file.stat().st_mtime_ns, file.read_bytes()
    assert len(content) > 8192  # more than the hashed ends
    changed = {"size": content + b"!", "first bytes": b"!" + content[1:], "last bytes": content[:-1] + b"!"}
    file.write_bytes(changed.get(change, content))
    os.utime(file, ns=(stamp, stamp + (change == "time")))
    with pytest.raises(UserError, match=r"part of .*texts in shard 1 .* has changed since; .*--force") as caught:
        build_dataset(data)
    assert "\n" not in str(caught.value) and len(list(partial(tmp_path / "set").glob("shard-*.json"))) == 2
    build_dataset(data, force=True)
    build_dataset(section(tmp_path / "fresh", [str(tmp_path / "texts")]))
    assert contents(tmp_path / "set") == contents(tmp_path / "fresh")


def test_an_interrupted_build_refuses_other_settings(
    sources: list[str], undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, section(tmp_path / "set", sources, vocab_size=300), 3)
    with pytest.raises(UserError, match=r"interrupted build .*vocab_size: 300 -> 400.*--force"):
        build_dataset(section(tmp_path / "set", sources))
    build_dataset(section(tmp_path / "set", sources), force=True)
    assert contents(tmp_path / "set") == undisturbed


def test_an_interrupted_build_refuses_another_end_of_document_token(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(documents(sources), 300)
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    configured = tmp_path / "tokenizer_config.json"
    configured.write_text('{"eos_token": "<stop>"}')
    data = section(tmp_path / "set", sources, tokenizer=str(tmp_path))
    interrupted(monkeypatch, data, 3)
    configured.unlink()
    with pytest.raises(UserError, match=r"end_of_document_token: <stop> -> <\|endoftext\|>.*--force"):
        build_dataset(data)


def test_an_interrupted_replacement_continues(
    sources: list[str], undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_dataset(section(tmp_path / "set", sources, vocab_size=300))
    with monkeypatch.context() as context:
        stop_after(context, 5)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(section(tmp_path / "set", sources), force=True)
    monkeypatch.setattr(build, "train_tokenizer", None)
    build_dataset(section(tmp_path / "set", sources))  # without force, which the first one had
    assert contents(tmp_path / "set") == undisturbed


def test_a_damaged_shard_is_rebuilt(
    sources: list[str], undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = section(tmp_path / "set", sources)
    interrupted(monkeypatch, data, 6)
    largest = max(partial(tmp_path / "set").glob("shard-*.train.bin"), key=lambda file: file.stat().st_size)
    os.truncate(largest, 10)
    build_dataset(data)
    assert contents(tmp_path / "set") == undisturbed


def test_a_record_is_complete_even_after_a_power_failure(tmp_path: Path) -> None:
    folder = tmp_path / "build"
    folder.mkdir()
    texts = ["one " * 50, "two " * 50]
    with Disk(folder, tmp_path) as disk:
        for content in texts:
            shards.write_atomically(folder / "record.json", content, durable=True)
    found = [(folder / "record.json").read_text() for _, folder in disk.states() if (folder / "record.json").exists()]
    assert set(found) == set(texts) and found[-1] == texts[1]


def test_the_tokenizer_is_trained_on_a_limited_part_of_every_source(tmp_path: Path) -> None:
    names = []
    for number, size in enumerate((100, 5000, 5000)):
        (tmp_path / f"{number}.txt").write_text("abcde"[number] * size)
        names.append(str(tmp_path / f"{number}.txt"))
    opened = [build.open_source(name, "text") for name in names]
    assert list(map(len, build._tokenizer_sample(opened, 3100))) == [100, 1500, 1500]
    whole = build._tokenizer_sample(opened, 10**6)
    assert list(map(len, whole)) == [100, 5000, 5000]
    (tmp_path / "0.txt").write_text("é" * 50)
    assert list(build._tokenizer_sample(opened[:1], 33)) == ["é" * 16]  # 32 bytes
