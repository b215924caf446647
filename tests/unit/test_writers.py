"""metrics.jsonl, TensorBoard and W&B (the real package, offline) agree on steps that are repeated."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mosa.config import Config
from megatron_mosa.metrics import read_journal, scalars
from megatron_mosa.train.writers import Writers
from tests.unit.test_trainer import config

OLD, NEW = 9.0, 1.0  # losses before a step is repeated, and after


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("CACHE_DIR", f"{tmp_path}"), ("CONSOLE", "off")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    return config(tmp_path, logging={"tensorboard": True, "wandb_project": "p"})


def opened(settings: Config, resumed_step: int = 0) -> Writers:
    directory = Path(settings.run.directory) / settings.run.name
    directory.mkdir(parents=True, exist_ok=True)
    writers = Writers(settings, directory, is_main=True, resumed_step=resumed_step)
    writers.start()
    return writers


def closed(writers: Writers) -> None:
    """Close the writers, and wait for the process that writes W&B's files, as at the end of a program."""
    import wandb

    writers.close()
    wandb.teardown()


def write(writers: Writers, first: int, last: int, loss: float) -> None:
    """Write training lines with a list per layer and one per head, and a validation line every five steps."""
    for step in range(first, last + 1):
        line: dict[str, Any] = {"step": step, "loss": math.nan if step == 3 else loss + step, "causal": True}
        line |= dict(grad_norm=1.0, learning_rate=0.125, tokens_per_second=1.0, mfu=0.5, peak_memory_gib=1.0)  # exact
        line |= {"unselected_share": [0.25, loss], "load_of_heads": [[loss, loss], [loss, loss, loss]]}
        writers.training(line, 0)
        if step % 5 == 0:
            validation = {"step": step, "validation_loss": loss - step, "causal": True}
            writers.validation(validation | {"validation_perplexity": 2.0})


def wandb_files(directory: Path) -> list[Path]:
    """Return the file of each start of a W&B run, in the order of their last writes."""
    return sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def identity(file: Path) -> str:
    return file.stem.removeprefix("run-")


def records(file: Path) -> Iterator[bytes]:
    """Yield the records of W&B's file: a LevelDB log after 7 bytes, with 32 KiB blocks and 7-byte fragment headers."""
    content, record = file.read_bytes(), b""
    assert content.startswith(b":W&B")
    place = 7
    while place + 7 <= len(content):
        if (left := -place % 32768) < 7 and left:  # a block ends with zeros
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last fragment
            yield record
            record = b""


def wandb_rows(file: Path) -> dict[int, dict[str, Any]]:
    """Return the rows in W&B's file, by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows: dict[int, dict[str, Any]] = {}
    for data in records(file):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = rows.setdefault(record.history.step.num, {})
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                row[name] = row.get(name, {}) | {inner[0]: value} if inner else value
    return rows


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Return this project's scalars, with NaN as None so that equal rows compare equal."""
    kept = {name: value for name, value in found.items() if not name.startswith("_") and not isinstance(value, dict)}
    return {name: None if value == "NaN" or value != value else value for name, value in kept.items()}


def check_agreement(directory: Path, file: Path, steps: int) -> None:
    """Check that TensorBoard and W&B have exactly the numbers of the journal."""
    expected: dict[int, dict[str, Any]] = {step: {} for step in range(1, steps + 1)}
    for line in read_journal(directory / "metrics.jsonl"):
        found = numbers(scalars(line))
        assert not expected[line["step"]].keys() & found, f"two lines of step {line['step']}"
        expected[line["step"]] |= found
    rows = wandb_rows(file)
    assert {step: numbers(row) for step, row in rows.items()} == expected
    events = EventAccumulator(str(directory / "tensorboard"), {"scalars": 0, "histograms": 0}).Reload()
    shown: dict[int, dict[str, Any]] = {step: {} for step in range(1, steps + 1)}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in shown[event.step], f"{name} has two values of step {event.step}"
            shown[event.step] |= numbers({name: event.value})
    assert shown == expected
    for layer, heads in ((0, 2), (1, 3)):
        histograms = events.Histograms(f"train/load_of_heads/layer_{layer}")
        assert [event.step for event in histograms] == list(range(1, steps + 1))
        assert [event.histogram_value.sum / heads for event in histograms] == [OLD] * 5 + [NEW] * (steps - 5)
        for step in range(6, steps + 1):
            histogram = rows[step][f"train/load_of_heads/layer_{layer}"]
            assert sum(histogram["values"]) == heads
            assert histogram["bins"][0] <= NEW <= histogram["bins"][-1] < OLD


def test_settings_that_wandb_refuses_are_named(
    settings: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offlin")
    closed(opened(settings))
    assert re.search(r"W&B gets no more rows .*: mode: .*'offline'.*'offlin'", capsys.readouterr().out)


@pytest.mark.parametrize("how", ["rewind", "crash"])
def test_all_outputs_show_the_new_values_of_repeated_steps(
    settings: Config, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    writers = opened(settings)
    write(writers, 1, 10, OLD)
    if how == "rewind":
        writers.rewind(5)
    else:
        writers = opened(settings, resumed_step=5)  # without closing the first
    write(writers, 6, 11, NEW)
    closed(writers)
    directory = Path(settings.run.directory) / settings.run.name
    before, after = wandb_files(directory)
    record = json.loads((directory / "wandb.json").read_text())
    assert identity(before) != identity(after) == record["id"] and record["title"] == "run (again from step 6)"
    assert numbers(wandb_rows(before)[10])["train/loss"] == OLD + 10  # the old run keeps its rows
    check_agreement(directory, after, 11)
    assert "ignored" not in "".join(capfd.readouterr())


def test_resuming_continues_the_wandb_run_of_the_directory(settings: Config) -> None:
    writers = opened(settings)
    write(writers, 1, 5, OLD)
    closed(writers)
    writers = opened(settings, resumed_step=5)
    write(writers, 6, 7, NEW)
    closed(writers)
    directory = Path(settings.run.directory) / settings.run.name
    first, second = wandb_files(directory)
    assert identity(first) == identity(second)
    check_agreement(directory, second, 7)  # the last file of an id has all rows
    settings.run.directory += "/elsewhere"
    closed(opened(settings))
    (other,) = wandb_files(Path(settings.run.directory) / settings.run.name)
    assert identity(other) != identity(first)


class Server:
    """A fake of the package and W&B's server: keeps rows by id, and drops rows as W&B does."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self.opened: list[str] = []
        self.dropped: list[int] = []

    def finish(self) -> None:
        pass

    def Histogram(self, values: list[float]) -> list[float]:
        return values

    def init(self, id: str, **_: Any) -> SimpleNamespace:
        rows = self.rows.setdefault(id, {})
        self.opened.append(id)
        starting_step = least_step = max(rows) + 1 if rows else 0

        def log(row: dict[str, Any], step: int) -> None:
            nonlocal least_step
            if step < least_step:
                self.dropped.append(step)
                return
            least_step = step
            rows.setdefault(step, {}).update(row)

        return SimpleNamespace(starting_step=starting_step, log=log, finish=lambda: None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)  # type: ignore[arg-type]
    return server


@pytest.mark.parametrize("had", [3, 5, 8])
def test_a_server_with_fewer_or_more_steps_than_metrics_jsonl(settings: Config, server: Server, had: int) -> None:
    """Rows that a crash kept from being sent are sent later; steps lost from the file are repeated in a new run."""
    write(opened(settings), 1, 5, OLD)
    (first,) = server.opened
    for step in range(had + 1, 6):
        del server.rows[first][step]
    for step in range(6, had + 1):
        server.rows[first][step] = {"train/loss": OLD + step}
    write(opened(settings, resumed_step=5), 6, 9, NEW)
    assert (server.opened[-1] == first) == (had <= 5) and server.dropped == []
    record = json.loads((Path(settings.run.directory) / settings.run.name / "wandb.json").read_text())
    assert record["title"] == ("run" if had <= 5 else "run (again from step 6)")
    rows = server.rows[server.opened[-1]]
    losses = {step: row["train/loss"] for step, row in rows.items() if step != 3}
    assert losses == {step: (OLD if step < 6 else NEW) + step for step in (1, 2, 4, 5, 6, 7, 8, 9)}


def test_a_repeated_validation_is_not_dropped(settings: Config, server: Server) -> None:
    write(opened(settings), 1, 4, OLD)
    writers = opened(settings, resumed_step=4)
    writers.validation({"step": 4, "validation_loss": 2.5, "validation_perplexity": 2.0, "causal": True})
    assert server.dropped == []
    assert sorted(server.rows[server.opened[-1]]) == [1, 2, 3, 4]
    assert server.rows[server.opened[-1]][4]["validation/validation_loss"] == 2.5


def test_a_run_goes_on_without_wandb_and_the_next_start_catches_up(
    settings: Config, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = opened(settings)
    write(writers, 1, 2, OLD)
    assert writers.wandb is not None

    def unreachable(*_: Any, **__: Any) -> None:
        raise RuntimeError("the network is down")

    writers.wandb.run.log = unreachable
    write(writers, 3, 4, OLD)
    with monkeypatch.context() as patch:
        patch.setattr(server, "init", unreachable)
        write(opened(settings, resumed_step=4), 5, 5, OLD)
    assert capsys.readouterr().out.count("W&B gets no more rows until the next start, which adds them: the net") == 2
    opened(settings, resumed_step=5)
    (rows,) = server.rows.values()
    assert sorted(rows) == [1, 2, 3, 4, 5]


def test_runs_without_a_record_keep_their_id(settings: Config, server: Server) -> None:
    """The id was the run's name. Runs that started without W&B or in another project get a new one."""
    directory = Path(settings.run.directory) / settings.run.name
    (directory / "wandb").mkdir(parents=True)
    write(opened(settings), 1, 2, OLD)
    opened(settings, resumed_step=2)
    assert server.opened == ["run", "run"]
    settings.logging.wandb_project = "q"
    (directory / "wandb").rmdir()
    opened(settings, resumed_step=2)
    opened(settings, resumed_step=2)
    assert server.opened[2] == server.opened[3] != "run"
    assert sorted(server.rows[server.opened[3]]) == [1, 2]
    settings.logging.wandb_project = "p"
    opened(settings, resumed_step=2)
    assert server.opened[4] not in server.opened[:4]
    (directory / "wandb.json").write_text('{"project": "p", "na')  # a power failure
    opened(settings, resumed_step=2)
    assert server.opened[5] not in server.opened[:5]


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_lines_that_a_full_disk_refused_are_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, logging={"tensorboard": False})
    stops: list[int] = []
    writers = Writers(settings, tmp_path, is_main=True, resumed_step=0, on_failure=lambda: stops.append(1))
    writers.start()
    write(writers, 1, 2, OLD)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("megatron_mosa.metrics.journal.Path.open", half_written)
    write(writers, 3, 4, OLD)
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and stops == [1]
    assert writers.failure is not None
    assert writers.failure.startswith(f"could not write '{tmp_path}/metrics.jsonl': No space left on device; free")
    writers.close()
    assert [line["step"] for line in read_journal(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@contextmanager
def half_written(path: Path, *_: object, **__: object) -> Iterator[SimpleNamespace]:
    """A file on a disk that is full after a few bytes."""

    def write(text: str) -> None:
        with open(path, "a") as file:
            file.write(text[:5])
        no_space()

    yield SimpleNamespace(write=write)


def test_lines_open_the_outputs_if_nothing_did_before(tmp_path: Path) -> None:
    settings = config(tmp_path, logging={"tensorboard": False})
    for _ in range(2):
        writers = Writers(settings, tmp_path, is_main=True, resumed_step=2)
        writers.rewind(1)
        write(writers, 2, 4, OLD)
        writers.close()
        assert [line["step"] for line in read_journal(tmp_path / "metrics.jsonl")] == [2, 3, 4]
    Writers(settings, tmp_path, is_main=True, resumed_step=2).close()


def test_a_diverged_perplexity_fits_into_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writers = Writers(config(tmp_path, logging={"tensorboard": False}), tmp_path, is_main=True, resumed_step=0)
    for perplexity, shown in ((math.exp(700), "1.01e+304"), (31415.926, "31415.93")):
        loss = math.log(perplexity)
        writers.validation({"step": 1, "validation_loss": loss, "validation_perplexity": perplexity, "causal": True})
        assert f"perplexity {shown}\n" in capsys.readouterr().out
    writers.close()


def test_a_run_goes_on_without_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_mosa.utils.files._warned", set())
    writers = Writers(config(tmp_path, logging={"tensorboard": True}), tmp_path, is_main=True, resumed_step=0)
    writers.start()
    write(writers, 1, 1, OLD)
    monkeypatch.setattr(writers.tensorboard._get_file_writer().event_writer._async_writer._writer, "write", no_space)
    write(writers, 2, 4, OLD)
    writers.close()
    told = capsys.readouterr().err
    assert told == (
        f"warning: TensorBoard gets no more events: could not write '{tmp_path}/tensorboard': No space left on device\n"
    )
    assert [line["step"] for line in read_journal(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
