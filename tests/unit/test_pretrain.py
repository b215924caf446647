"""The assembly of a run: what check_start has found reaches the loop. Engine and data are fakes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_mosa.data import Mixture
from megatron_mosa.engine import Batch
from megatron_mosa.metrics import read_journal
from megatron_mosa.parallel import Layout
from megatron_mosa.train import run
from megatron_mosa.train.start import ResumePoint
from tests.unit.test_checkpoint import metadata, publish
from tests.unit.test_trainer import (
    RATES,
    Clock,
    FakeEngine,
    Samples,
    SlowStore,
    batches,
    config,
    make_services,
)


class Engine(FakeEngine):
    def __init__(self, settings: Any, vocab_size: int, layout: Layout) -> None:
        super().__init__(Clock())
        assert vocab_size == 50

    def destroy(self) -> None:
        self.destroyed = True


NOTHING: dict[str, dict[str, str]] = {"train": {}, "validation": {}}  # without hashes


class Run:
    """Rank 0 of a run of two data-parallel ranks, each of which has two samples per step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.settings = config(folder, validation={"interval": 4, "num_samples": 60})
        self.directory = folder / "run"
        self.store = SlowStore(self.directory / "checkpoints")
        self.loaded: list[Path] = []
        self.engines: list[Engine] = []
        self.asked: list[dict[str, Any]] = []
        monkeypatch.setattr(self.store, "load", lambda engine, path: self.loaded.append(path))
        monkeypatch.setattr(run, "CheckpointStore", SimpleNamespace(of=lambda *_: self.store))
        monkeypatch.setattr(run, "DeepSpeedEngine", self._engine)
        monkeypatch.setattr(run, "validation_samples", lambda *_: Samples())
        monkeypatch.setattr(run, "training_samples", lambda *_: self)
        monkeypatch.setattr(run, "training_batches", self._batches)
        monkeypatch.setattr(run, "load_initial_weights", lambda engine, path: self.loaded.append(path))

    def train(self, start: ResumePoint, last_validated: int = 0) -> str | None:
        layout = Layout(0, 2, 0, 1, 0, 2, torch.device("cpu"))
        services = make_services(self.directory, Clock(), self.settings)
        return run._train(self.settings, start, last_validated, layout, services)

    def start(self, step: int, **changes: Any) -> ResumePoint:
        manifest = SimpleNamespace(
            vocab_size=50, tokenizer_hash="t", encoding_hash="e", fingerprint="f", splits=NOTHING, source_names=["s"]
        )
        data = Mixture((Path("unused"),), (1.0,), (cast(Any, manifest),))
        found = ResumePoint(self.directory, data, None, None, (), None, index_samples=32)
        if step:
            path = publish(self.store.folder, step)
            found = replace(found, checkpoint=path, metadata=replace(metadata(step), consumed_samples=4 * step))
        return replace(found, **changes)

    def prepare(self, first: int, last: int) -> None:
        self.prepared = first, last

    def _engine(self, *arguments: Any) -> Engine:
        self.engines.append(Engine(*arguments))
        return self.engines[-1]

    def _batches(self, samples: Any, **asked: Any) -> Iterator[Batch]:
        self.asked.append(asked)
        return batches(asked["consumed_samples"])


def test_a_run_resumes_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, tmp_path)
    start = run.start(4)
    (run.directory / "skip_steps.json").write_text(json.dumps([6]))  # recorded by an earlier rewind
    before = [{"step": step, "loss": step / 10} for step in range(1, 7)]  # two steps further than the checkpoint
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    damaged = publish(run.store.folder, 8)
    assert run.train(replace(start, damaged=((damaged, "broken"),))) is None
    (engine,) = run.engines
    assert run.loaded == [start.checkpoint] and engine.destroyed
    assert run.prepared == (16, 31)
    data = dict(global_batch_size=4, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=2, num_workers=1)
    assert run.asked == [data | {"consumed_samples": 16, "end": 32}]
    assert engine.samples == [[16, 17], [24, 25], [28, 29]]
    assert engine.rates == pytest.approx([RATES[4], RATES[6], RATES[7]])
    assert (run.store.folder / "damaged-step-00000008").is_dir()
    assert [saved.step for saved in run.store.saved] == [8]
    assert run.store.saved[0].data == start.data_identity | {"sources": ["s"]}
    lines = read_journal(run.directory / "metrics.jsonl")
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8]  # step 4 had no validation line
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert losses == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 2.0), (6, None), (7, 2.0), (8, 2.0)]


def test_a_start_past_its_last_step_says_so(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.train.stop_after_step, settings.optimizer.warmup_steps = 1, 0
    assert list(run._surprises(settings, 2, 1)) == ["nothing to do: step 2 is past train.stop_after_step=1"]
    assert list(run._surprises(settings, 1, 1)) == ["nothing to do: step 1 has already reached train.stop_after_step=1"]
    settings.train.skip_steps, settings.train.steps = [2, 5, 3, 99], 8
    late, beyond = run._surprises(settings, 5, 8, skipped=[3])
    assert late.startswith("steps [2, 5] of train.skip_steps have been trained, since this run continues after step 5;")
    assert beyond == "steps [99] of train.skip_steps are above train.steps=8"


def test_a_validation_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, tmp_path)
    run.train(run.start(4), last_validated=4)
    lines = read_journal(run.directory / "metrics.jsonl")
    assert [line["step"] for line in lines if "validation_loss" in line] == [8]


@pytest.mark.parametrize("step", [0, 4])
def test_initial_weights_are_loaded_unless_there_is_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = Run(monkeypatch, tmp_path)
    start = run.start(step, initial=tmp_path / "initial")
    run.train(start)
    assert run.loaded == [start.checkpoint or tmp_path / "initial"]
    assert run.engines[0].samples[0] == [4 * step, 4 * step + 1]
