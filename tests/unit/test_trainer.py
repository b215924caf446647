"""The training loop and its callbacks with a fake engine, on a clock that only the engine advances."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mosa.checkpoint import CheckpointStore, Metadata
from megatron_mosa.config import Config, config_from_dict
from megatron_mosa.engine import Batch, StepResult
from megatron_mosa.errors import StorageError, UnrecoverableError
from megatron_mosa.metrics import read_journal, run_totals
from megatron_mosa.model import model_flops
from megatron_mosa.parallel import Layout
from megatron_mosa.resilience.faults import FaultInjection
from megatron_mosa.resilience.interruption import Interruption, Signals
from megatron_mosa.resilience.peers import PeerMonitor
from megatron_mosa.resilience.services import ResilienceServices
from megatron_mosa.resilience.status import RunStatus
from megatron_mosa.resilience.watchdog import Watchdog
from megatron_mosa.train.callbacks import progress
from megatron_mosa.train.callbacks.checkpointing import Checkpointing
from megatron_mosa.train.callbacks.monitoring import Heartbeat, StepMonitor
from megatron_mosa.train.callbacks.validation import Validation
from megatron_mosa.train.rewind import Rewinder, skipped_steps
from megatron_mosa.train.trainer import Callback, Trainer, TrainingState
from megatron_mosa.train.writers import Writers
from tests.unit.test_checkpoint import publish

SECONDS = 10.0  # of one operation of the engine
VOCAB_SIZE = 50


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeEngine:
    """A fake engine: advances the clock, and records its arguments."""

    accumulation_steps = 2
    module = torch.nn.Module()

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rates: list[float] = []
        self.samples: list[list[int]] = []
        self.results: dict[int, StepResult] = {}  # by the number of steps taken before

    def train_step(self, batches: Iterable[Batch], learning_rate: float) -> StepResult:
        self.clock.now += SECONDS * (1 + len(self.rates) % 2)
        self.rates.append(learning_rate)
        self.samples.append([int(batch["tokens"]) for batch in batches])
        return self.results.get(len(self.rates) - 1, StepResult(loss=2.0, grad_norm=1.0))

    def optimizer_step(self) -> int:
        return len(self.rates)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        for _ in batches:
            self.clock.now += SECONDS
        return 3.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the engine and of the progress callback."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=clock))
    return clock


@pytest.fixture
def engine(clock: Clock) -> FakeEngine:
    return FakeEngine(clock)


def config(folder: Path, **sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "run": {"name": "run", "directory": str(folder)},
        "model": {"num_layers": 1, "hidden_size": 16, "num_dense_heads": 2, "head_dim": 8},
        "mosa": {"num_heads": 0},
        "data": {"path": "unused", "sequence_length": 8},
        "train": {"steps": 8, "micro_batch_size": 1, "global_batch_size": 4},
        "optimizer": {"learning_rate": 1.0, "min_learning_rate": 0.2, "warmup_steps": 3, "schedule": "linear"},
        "validation": {"interval": 100, "num_samples": 5},
        "logging": {"interval": 1, "tensorboard": False, "peak_tflops": 2.0},
    }
    return config_from_dict({name: tree.get(name, {}) | sections.get(name, {}) for name in tree | sections})


def batches(first: int = 0) -> Iterator[Batch]:
    """Yield rank 0's micro-batches of one sample each, from global batches of 4; the token is the sample's number."""
    while True:
        for sample in (first, first + 1):
            yield {"tokens": torch.tensor([[sample]])}
        first += 4


def trainer(
    settings: Config, engine: Any, callbacks: list[Callback], services: ResilienceServices | None = None, **state: Any
) -> Trainer:
    layout = Layout(0, 2, 0, 1, 0, 2, torch.device("cpu"))
    services = services or make_services(Path(settings.run.directory), Clock(), settings)
    return Trainer(settings, engine, layout, TrainingState(**state), callbacks, services)


def writers(settings: Config, folder: Path, resumed_step: int = 0) -> Writers:
    opened = Writers(settings, folder, is_main=True, resumed_step=resumed_step)
    opened.start()
    return opened


RATES = [1 / 3, 2 / 3, 1.0, 0.84, 0.68, 0.52, 0.36, 0.2]  # three steps of warm-up, five of decay


@pytest.mark.parametrize("taken", [0, 5])
def test_each_step_has_its_own_learning_rate_and_samples(tmp_path: Path, engine: FakeEngine, taken: int) -> None:
    settings = config(tmp_path)
    lines = progress.Progress(writers(settings, tmp_path), VOCAB_SIZE)
    run = trainer(settings, engine, [lines], step=taken, consumed_samples=4 * taken)
    run.run(batches(4 * taken))
    assert engine.rates == pytest.approx(RATES[taken:])
    found = read_journal(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(taken + 1, 9))
    assert [line["learning_rate"] for line in found] == pytest.approx(RATES[taken:])
    assert [line["tokens"] for line in found] == [4 * 8 * step for step in range(taken + 1, 9)]
    assert engine.samples == [[4 * step, 4 * step + 1] for step in range(taken, 8)]
    assert run.state == TrainingState(step=8, consumed_samples=32)


def test_skipped_steps_consume_their_samples(tmp_path: Path, engine: FakeEngine) -> None:
    settings = config(tmp_path, train={"skip_steps": [2, 3], "stop_after_step": 5})
    run = trainer(settings, engine, [])
    run.run(batches())
    assert engine.samples == [[0, 1], [12, 13], [16, 17]]
    assert engine.rates == pytest.approx([RATES[0], RATES[3], RATES[4]])
    assert run.state == TrainingState(step=5, consumed_samples=20)


def test_skipped_steps_count_as_such(tmp_path: Path, engine: FakeEngine) -> None:
    settings = config(
        tmp_path,
        logging={"interval": 1, "tensorboard": False, "peak_tflops": 2.0},
        train={"skip_steps": [2, 3, 4, 6], "stop_after_step": 7},
    )
    told = writers(settings, tmp_path)
    callbacks = [StepMonitor(told, settings.resilience), progress.Progress(told, VOCAB_SIZE)]
    run = trainer(settings, engine, callbacks)
    run.run(batches())
    assert run.skipped == {2, 3, 4, 6}
    lines = read_journal(tmp_path / "metrics.jsonl")
    assert [line["tokens_per_second"] is None for line in lines] == [step in (2, 3, 4, 6) for step in range(1, 8)]
    assert [line["mfu"] is None for line in lines] == [step in (2, 3, 4, 6) for step in range(1, 8)]
    totals = run_totals(lines)
    assert (totals.steps, totals.tokens) == (7, 3 * 4 * 8)


@pytest.mark.parametrize("taken", [0, 6])
def test_a_line_says_what_was_skipped_since_the_last_one(tmp_path: Path, engine: FakeEngine, taken: int) -> None:
    """Also what an earlier start skipped after its last line."""
    settings = config(tmp_path, logging={"interval": 7}, train={"skip_steps": [2, 3, 4, 6], "stop_after_step": 7})
    told = writers(settings, tmp_path)
    if taken:
        told.training({"step": 1, "tokens": 4 * 8, "tokens_per_second": math.nan}, math.nan)
        told = writers(settings, tmp_path, taken)
    lines = progress.Progress(told, VOCAB_SIZE)
    trainer(settings, engine, [lines], step=taken, consumed_samples=4 * taken).run(batches(4 * taken))
    line = read_journal(tmp_path / "metrics.jsonl")[-1]
    assert (line["tokens"], line["skipped_tokens"]) == (7 * 4 * 8, 4 * 4 * 8)


def test_speed_and_mfu_cover_all_ranks(tmp_path: Path, engine: FakeEngine) -> None:
    settings = config(tmp_path, logging={"interval": 3, "tensorboard": False, "peak_tflops": 2.0})
    trainer(settings, engine, [progress.Progress(writers(settings, tmp_path), VOCAB_SIZE)]).run(batches())
    flops = model_flops(settings, VOCAB_SIZE) * 4  # of a step
    lines = read_journal(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 8]
    for line, steps, seconds in zip(lines, (3, 3, 2), (40.0, 50.0, 30.0), strict=True):  # 10 20 10, 20 10 20, 10 20
        assert line["tokens_per_second"] == pytest.approx(steps * 4 * 8 / seconds)
        assert line["model_tflops_per_second"] == pytest.approx(steps * flops / seconds / 1e12)
        assert line["mfu"] == pytest.approx(steps * flops / seconds / (2 * 2e12))  # two ranks


class Samples:
    """Validation samples whose content does not matter."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Batch:
        return {"tokens": torch.zeros(8, dtype=torch.int64), "loss_mask": torch.ones(8)}

    def unigram_entropy(self) -> float:
        return 4.0

    def document_lengths(self) -> list[list[int]]:
        return []


class RecordingWatchdog(Watchdog):
    """Never fires; records the longest time between beats, and all activities."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        super().__init__(folder, 0, 0, lambda: None)
        self.clock = clock
        self.last, self.longest = clock(), 0.0
        self.told: list[str] = []

    def beat(self, doing: str) -> None:
        super().beat(doing)
        self.longest, self.last = max(self.longest, self.clock() - self.last), self.clock()
        self.told.append(doing)


def make_services(folder: Path, clock: Clock, settings: Config) -> ResilienceServices:
    faults = FaultInjection(settings.fault_injection, folder, 0)
    status = RunStatus(folder, is_main=True)
    peers = PeerMonitor(lambda rank: None)
    return ResilienceServices(Interruption(Signals(), None), RecordingWatchdog(folder, clock), status, faults, peers)


def test_every_step_and_validation_batch_sends_a_heartbeat(tmp_path: Path, engine: FakeEngine, clock: Clock) -> None:
    """A whole validation takes 30 times as long as the longest time between beats."""
    settings = config(tmp_path, validation={"interval": 4, "num_samples": 60})
    services = make_services(tmp_path, clock, settings)
    validation = Validation(writers(settings, tmp_path), Samples())  # type: ignore[arg-type]
    trainer(settings, engine, [Heartbeat(services), validation], services).run(batches())
    watchdog = services.watchdog
    assert isinstance(watchdog, RecordingWatchdog)
    assert watchdog.longest == 2 * SECONDS  # the longer of the steps
    assert clock.now == 8 * 1.5 * SECONDS + 2 * 30 * SECONDS
    for step in range(1, 9):
        assert {f"taking step {step}", f"callbacks after step {step}"} <= set(watchdog.told)
    for step in (4, 8):
        assert [told for told in watchdog.told if told.startswith(f"validating step {step}")] == [
            f"validating step {step}, batch {number}" for number in range(30)
        ]


class Request(Callback):
    """Sends a signal in step 4, or after it."""

    def __init__(self, signals: Signals, in_step: bool) -> None:
        self.signals = signals
        self.in_step = in_step

    def around_step(self, trainer: Trainer, step: int) -> AbstractContextManager[object]:
        if step == 4 and self.in_step:
            self.signals.received.append(signal.SIGTERM)
        return nullcontext()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.state.step == 4 and not self.in_step:
            self.signals.received.append(signal.SIGTERM)


@pytest.mark.parametrize("in_step", [True, False])
def test_a_run_stops_after_the_step_of_a_stop_request(
    tmp_path: Path, engine: FakeEngine, clock: Clock, in_step: bool
) -> None:
    settings = config(tmp_path, validation={"interval": 4, "num_samples": 60})
    services = make_services(tmp_path, clock, settings)
    request = Request(services.interruption.signals, in_step)
    validation = Validation(writers(settings, tmp_path), Samples())  # type: ignore[arg-type]
    run = trainer(settings, engine, [request, validation], services)
    run.run(batches())
    assert (run.state.step, run.stop_reason, run.last_step) == (4, "SIGTERM", 4)
    assert read_journal(tmp_path / "metrics.jsonl") == []  # validation was skipped or interrupted
    assert clock.now == 4 * 1.5 * SECONDS


class Store(CheckpointStore):
    """A store of checkpoints without state, which records what is loaded."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keep_last=9)
        self.loaded: list[str] = []

    def load(self, engine: Any, path: Path) -> None:
        self.loaded.append(path.name)


def test_a_rewind_discards_the_spike_and_all_later_steps(tmp_path: Path) -> None:
    engine = FakeEngine(Clock())
    resilience = {"spike_window": 3, "spike_sigmas": 6.0, "on_spike": "rewind", "max_rewinds": 1}
    settings = config(tmp_path, resilience=resilience)
    for step in (2, 4, 5, 6, 7):
        publish(tmp_path / "checkpoints", step, consumed_samples=4 * step)
    (tmp_path / "checkpoints" / "step-00000005" / "metadata.json").write_bytes(b"")  # so the one before it is loaded
    lines = writers(settings, tmp_path)
    store = Store(tmp_path / "checkpoints")
    rewinder = Rewinder(tmp_path, store, lines, lambda state: batches(state.consumed_samples), max_rewinds=1)
    run = trainer(settings, engine, [StepMonitor(lines, settings.resilience), progress.Progress(lines, VOCAB_SIZE)])
    run.rewind = rewinder.rewind
    # steps 1 to 6, with a spike in 6; then 5, 7 with another spike, and 8 (6 is skipped)
    losses = [2.0, 2.1, 2.0, 2.1, 2.0, 50.0, 2.2, 60.0, 2.3]
    engine.results = {number: StepResult(loss, 1.0) for number, loss in enumerate(losses)}
    run.run(batches())
    assert store.loaded == ["step-00000004"]
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "damaged-step-00000005", "damaged-step-00000006", "damaged-step-00000007", "step-00000002", "step-00000004",
    ]  # fmt: skip
    assert skipped_steps(tmp_path) == [6] and run.skip_steps == {6} and settings.train.skip_steps == []
    assert [first for first, _ in engine.samples] == [0, 4, 8, 12, 16, 20, 16, 24, 28]
    assert engine.rates[5:] == pytest.approx([RATES[5], RATES[4], RATES[6], RATES[7]])
    journal = read_journal(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in journal] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["loss"] for line in journal] == [2.0, 2.1, 2.0, 2.1, 2.2, None, 60.0, 2.3]
    assert run.state == TrainingState(step=8, consumed_samples=32)
    assert run.skipped == {6} and [line["skipped_tokens"] for line in journal] == [0, 0, 0, 0, 0, 32, 0, 0]


def test_non_finite_steps_are_reported_and_too_many_end_the_run(
    tmp_path: Path, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, resilience={"max_skipped_steps": 2})
    lines = writers(settings, tmp_path)
    nan = StepResult(math.nan, math.nan)
    engine.results = {1: nan, 3: StepResult(math.nan, math.nan, is_empty=True), 4: StepResult(2.0, math.inf)}
    run = trainer(settings, engine, [StepMonitor(lines, settings.resilience)])
    with pytest.raises(UnrecoverableError, match="not finite in 2 consecutive steps, up to step 5"):
        run.run(batches())
    told = capsys.readouterr().out
    assert "step 2 skipped: loss nan, gradient norm nan; samples 4 to 7 of the data order; 1 skipped" in told
    assert "step 4 skipped: its batch has no token that counts (loss_mask is zero); samples 12 to 15" in told
    assert "step 5 skipped: loss 2.0, gradient norm inf; samples 16 to 19 of the data order; 3 skipped" in told


class Write(Future[Path]):
    """A write that completes when its result is requested."""

    def __init__(self, outcome: Path | StorageError) -> None:
        super().__init__()
        self.outcome = outcome

    def result(self, timeout: float | None = None) -> Path:
        if not self.done() and isinstance(self.outcome, Path):
            self.set_result(self.outcome)
        elif not self.done():
            self.set_exception(self.outcome)
        return super().result(timeout)


class SlowStore(CheckpointStore):
    """Records saves instead of writing them, and fails at some steps."""

    def __init__(self, folder: Path, failing: tuple[int, ...] = (), permanent_interval: int | None = None) -> None:
        super().__init__(folder, 2, permanent_interval)
        self.failing = failing
        self.saved: list[Metadata] = []
        self.writes: list[Write] = []

    def prepare(self, engine: Any) -> None:
        assert not self.saved

    def begin_save(self, engine: Any, metadata: Metadata) -> Future[Path]:
        assert all(write.done() for write in self.writes)  # one at a time
        path = self.folder / f"step-{metadata.step:08d}"
        self.writes.append(Write(StorageError("disk full") if metadata.step in self.failing else path))
        self.saved.append(metadata)
        return self.writes[-1]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_checkpoints_are_saved_when_they_are_due(
    tmp_path: Path, engine: FakeEngine, capsys: pytest.CaptureFixture[str], asynchronous: bool
) -> None:
    settings = config(tmp_path, checkpoint={"interval": 4, "asynchronous": asynchronous}, train={"skip_steps": [3]})
    nan = StepResult(math.nan, math.nan)
    engine.results = {2: nan}  # step 4, because step 3 is skipped
    store = SlowStore(tmp_path / "checkpoints", failing=(6,), permanent_interval=3)
    lines = writers(settings, tmp_path)

    class Pending(Callback):
        def after_step(self, trainer: Trainer, result: StepResult) -> None:
            assert asynchronous or all(write.done() for write in store.writes)

    trainer(settings, engine, [Checkpointing(lines, store, {"index_samples": 7}), Pending()]).run(batches())
    # 3 and 6 are permanent, 4 and 8 are due, 8 is the last; step 4 was not finite
    found = [(saved.step, saved.consumed_samples, saved.optimizer_step) for saved in store.saved]
    assert found == [(3, 12, 2), (6, 24, 5), (8, 32, 7)]
    assert store.saved[0].data == {"index_samples": 7}
    assert store.saved[0].layout == {"tensor_parallel_size": 1, "data_parallel_size": 2}
    assert all(write.done() for write in store.writes)
    told = capsys.readouterr().out
    assert "no checkpoint saved: step 4 was not finite" in told
    assert "could not write the checkpoint of step 6 to " in told and "disk full; training continues" in told
    assert f"checkpoint {store.folder / 'step-00000008'} (" in told


def test_a_run_fails_if_its_last_checkpoint_fails(tmp_path: Path, engine: FakeEngine) -> None:
    settings = config(tmp_path, checkpoint={"interval": 4})
    store = SlowStore(tmp_path / "checkpoints", failing=(8,))
    with pytest.raises(
        StorageError,
        match="could not write the checkpoint of step 8 .* disk full; free some space",
    ):
        trainer(settings, engine, [Checkpointing(writers(settings, tmp_path), store, {})]).run(batches())


def test_a_stop_request_saves_even_after_a_non_finite_step(tmp_path: Path, engine: FakeEngine, clock: Clock) -> None:
    settings = config(tmp_path, checkpoint={"interval": 100})
    services = make_services(tmp_path, clock, settings)
    engine.results = {3: StepResult(math.nan, math.nan)}
    store = SlowStore(tmp_path / "checkpoints")
    request = Request(services.interruption.signals, in_step=True)
    trainer(settings, engine, [request, Checkpointing(writers(settings, tmp_path), store, {})], services).run(batches())
    assert [saved.step for saved in store.saved] == [4]


@pytest.mark.parametrize(
    ("step", "last_validated", "measured"),
    [(4, 0, [4, 8]), (4, 4, [8]), (3, 0, [4, 8]), (0, 0, [4, 8]), (9, 8, [9])],  # 9: train.steps has been lowered since
)
def test_an_interrupted_validation_is_repeated(
    tmp_path: Path, engine: FakeEngine, step: int, last_validated: int, measured: list[int]
) -> None:
    settings = config(tmp_path, validation={"interval": 4, "num_samples": 60})
    lines = writers(settings, tmp_path, step)
    validation = Validation(lines, Samples(), last_validated)  # type: ignore[arg-type]
    trainer(settings, engine, [validation], step=step, consumed_samples=4 * step).run(batches(4 * step))
    found = read_journal(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found] == measured
    assert all(line["validation_loss"] == 3.0 and line["validation_perplexity"] == math.exp(3) for line in found)
