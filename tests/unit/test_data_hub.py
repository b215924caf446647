"""Hugging Face datasets: streaming gives the same documents, and builds continue after a stream stops."""

import json
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_mosa.config.schema import DataSection
from megatron_mosa.data import build, build_dataset, hub, reach
from megatron_mosa.data.tokenizer import load_tokenizer
from megatron_mosa.errors import UserError


def text(number: int) -> str:
    return f"Document {number}: " + " ".join(f"wörd{number * j % 23}\r\n" for j in range(60))


def write_rows(file: Path, texts: list[str]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))


def section(path: Path, source: str, **changes: Any) -> DataSection:
    return DataSection(path=str(path), sources=[source], **({"vocab_size": 400, "validation_fraction": 0.3} | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a local Hugging Face dataset of two files, 17 rows and 16 documents."""
    folder = tmp_path_factory.mktemp("sources") / "hub"
    write_rows(folder / "train-0.jsonl", [*map(text, range(10)), ""])
    write_rows(folder / "train-1.jsonl", list(map(text, range(10, 16))))
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def undisturbed(source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "set"
    build_dataset(section(folder, source))
    return contents(folder)


def documents(source: hub.HubSource, start: dict[str, Any] | None = None) -> list[str]:
    return [document for document, _ in source.read(start)]


class Faulty:
    """A streamed dataset that calls ``fault`` after some rows, and ends if that returns."""

    def __init__(self, dataset: Any, rows: int, fault: Any) -> None:
        self._dataset, self._rows, self._fault = dataset, rows, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def __iter__(self) -> Iterator[Any]:
        for number, row in enumerate(self._dataset):
            if number == self._rows:
                return self._fault()
            yield row


def raises() -> None:
    raise ConnectionResetError("reset by peer")


def fail(monkeypatch: pytest.MonkeyPatch, fault: Any, rows: Iterator[int]) -> list[int]:
    """Make every stream fail after the next number of rows; return a list with one entry per opened stream."""
    load, opened = datasets.load_dataset, []

    def faulty(*arguments: Any, **named: Any) -> Faulty:
        opened.append(1)
        return Faulty(load(*arguments, **named), next(rows), fault)

    monkeypatch.setattr(datasets, "load_dataset", faulty)
    monkeypatch.setattr(hub, "_PAUSE", 0.0)
    return opened


@pytest.mark.parametrize("shard_bytes", [2000, 10**9])  # some shards are finished, or none
@pytest.mark.parametrize(
    ("fault", "reason"), [(raises, "reset by peer"), (lambda: time.sleep(5), "no document for 0.3 s")]
)
def test_a_build_continues_after_a_stream_has_stopped(
    fault: Any, reason: str, shard_bytes: int, source: str, undisturbed: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data = section(tmp_path / "set", source, stream_timeout=0.3, shard_bytes=shard_bytes)
    with monkeypatch.context() as context:
        fail(context, fault, iter([99, 7, 0, 0]))  # the tokenizer reads everything, then three attempts fail
        with pytest.raises(UserError, match=f"{source} stopped after 7 documents: .*{reason}.*same command") as caught:
            build_dataset(data)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(build, "train_tokenizer", None)
    build_dataset(data)
    assert contents(tmp_path / "set") == undisturbed


def test_a_stream_that_stops_repeatedly_is_reopened(
    source: str, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = fail(monkeypatch, raises, iter([3] * 99))
    build_dataset(section(tmp_path / "set", source))
    assert contents(tmp_path / "set") == undisturbed
    assert len(opened) == 12  # 17 rows, three at a time, twice


def test_a_download_gives_the_same_tokens_as_a_stream(
    source: str, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    build_dataset(section(tmp_path / "set", source, streaming=False))
    assert contents(tmp_path / "set") == undisturbed


def test_a_dataset_that_changed_during_an_interrupted_build_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "hub" / "train.jsonl", list(map(text, range(16))))
    data = section(tmp_path / "set", f"hf:{tmp_path}/hub", shard_bytes=2000)
    with monkeypatch.context() as context:
        fail(context, raises, iter([99, 7, 0, 0]))
        with pytest.raises(UserError, match="stopped after 7"):
            build_dataset(data)
    write_rows(tmp_path / "hub" / "train.jsonl", list(map(text, range(17))))
    with pytest.raises(UserError, match="shard 0 .* has changed since; .*--force"):
        build_dataset(data)
    assert sum(split["documents"] for split in build_dataset(data, force=True).splits.values()) == 17


def test_a_stream_that_ends_early_is_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_PAUSE", 0.0)
    folder = tmp_path / "hub"
    write_rows(folder / "train.jsonl", list(map(text, range(8))))
    card = "---\ndataset_info:\n  features:\n  - {name: id, dtype: int64}\n  - {name: text, dtype: string}\n"
    (folder / "README.md").write_text(card + "  splits:\n  - {name: train, num_bytes: 1, num_examples: 9}\n---\n")
    with pytest.raises(UserError, match="stopped after 8 documents: it ended, but its description says 9"):
        build_dataset(section(tmp_path / "set", f"hf:{folder}"))
    (folder / "README.md").write_text(card + "  splits:\n  - {name: train, num_bytes: 1, num_examples: 8}\n---\n")
    assert build_dataset(section(tmp_path / "set", f"hf:{folder}"), force=True).splits["train"]["documents"] > 0


def test_names_of_datasets_configurations_and_splits(source: str, tmp_path: Path) -> None:
    whole = documents(hub.HubSource(source, "text", streaming=True, timeout=10))
    assert whole == list(map(text, range(16)))
    named = hub.HubSource(f"{source}:default@train", "text", streaming=True, timeout=10)
    assert documents(named) == whole
    part = hub.HubSource(f"{source}@train[:5]", "text", streaming=False, timeout=1)
    assert documents(part) == whole[:5]
    cases = [
        (f"{source}@tain", "has no split 'tain' \\(did you mean 'train'\\?\\); expected train"),
        (f"{source}:other", "could not open .*'other' not found"),
        (f"hf:{tmp_path}/none", "could not open .*none"),
        ("hf:", "does not name a dataset; expected hf:NAME"),
        (f"{source}@train[:5]", "data.streaming=false"),
    ]
    for name, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            build_dataset(section(tmp_path / "set", name))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="data.text_field='txt' is not a column of .* \\(did you mean 'text'"):
        build_dataset(section(tmp_path / "set", source, text_field="txt"))
    assert not list(tmp_path.iterdir())


def test_a_stream_resumes_at_a_position(source: str) -> None:
    streamed = hub.HubSource(source, "text", streaming=True, timeout=10)
    downloaded = hub.HubSource(source, "text", streaming=False, timeout=10)
    rows = list(streamed.read())
    for number in (3, 9, 10, 12, 15):
        position = json.loads(json.dumps(rows[number][1]))
        expected = [document for document, _ in rows[number + 1 :]]
        assert "state" in position and documents(streamed, position) == expected
        assert documents(downloaded, position) == expected
        del position["state"]  # reads and skips the rows before it
        assert documents(streamed, position) == expected


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that accepts no connection, as behind a firewall that drops packets."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        waiting = [socket.socket() for _ in range(2)]  # fill the queue of the server
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(reach, "_unreachable", [])
        monkeypatch.setattr("megatron_mosa.data.reach.unreachable", partial(reach.unreachable, seconds=0.5))
        yield f"127.0.0.1:{port}"
        for one in waiting:
            one.close()


def test_a_hub_that_does_not_answer_is_given_up(
    silent_hub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    with pytest.raises(
        UserError, match=rf"'no/such' is not in the cache .*{silent_hub} cannot be reached .*HF_HUB_OFF"
    ):
        load_tokenizer("no/such")
    with pytest.raises(UserError, match=rf"^data.sources: the dataset 'no/such' is not in the cache .*{silent_hub}"):
        hub.HubSource("hf:no/such", "text", streaming=True, timeout=10).describe()
    assert time.monotonic() - started < 10
    asked = capsys.readouterr().err
    assert "asking the Hugging Face hub (127.0.0.1) for the tokenizer 'no/such'\n" in asked
    assert asked.count("asking") == 1  # what does not answer is not asked again


def test_the_hub_is_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "getproxies", dict)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert reach.hub_host() == ("huggingface.co", 443)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror:8080/hf")
    assert reach.hub_host() == ("mirror", 8080)
    monkeypatch.setattr(reach, "getproxies", lambda: {"http": "proxy:3128"})
    monkeypatch.setattr(reach, "proxy_bypass", lambda host: host == "near")
    assert reach.hub_host() == ("proxy", 3128)
    monkeypatch.setenv("HF_ENDPOINT", "http://near")
    assert reach.hub_host() == ("near", 80)
