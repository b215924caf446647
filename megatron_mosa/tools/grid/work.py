"""The cells of a grid: what is known of them, and what is left to train, evaluate and measure."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_mosa.attention import looks_ahead
from megatron_mosa.checkpoint import published_checkpoints
from megatron_mosa.config import Config, difference, load_config, save_config
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.exit_codes import DONE, GAVE_UP, INTERRUPTED, STOPPED
from megatron_mosa.resilience import read_status
from megatron_mosa.tools.grid import results
from megatron_mosa.tools.grid.launch import Handle, Launcher
from megatron_mosa.tools.grid.plan import Cell, Plan, config_hash, what_determines_the_result
from megatron_mosa.tools.grid.request import Request
from megatron_mosa.tools.grid.results import Row, planned_row, write_results
from megatron_mosa.tools.grid.timing import Measurement, last_line
from megatron_mosa.utils import (
    counted,
    decimals,
    known_values,
    load_json,
    naming,
    parse_json,
    read_record,
    say,
    versions,
    write_atomically,
)

_PACKAGES = ("torch", "megatron-core", "deepspeed", "triton")
_POLL_SECONDS = 0.2
_LINE_SECONDS = 30.0  # between two lines of progress
OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class _Running:
    cell: Cell
    handle: Handle
    settle: Callable[[_Running, int], None]
    """Takes the exit code."""

    log: Path
    log_begin: int
    """Bytes of the log that were there before, since each start of a cell appends to it."""

    @property
    def reason(self) -> str:
        """Why it failed."""
        return last_line(self.log, self.log_begin)


@dataclass(frozen=True)
class _Start:
    """A line of starts.jsonl."""

    cell: str
    time: float
    alone: bool
    device: str
    versions: dict[str, str]
    processes: int | None = None
    """None: not known, of an earlier version."""


class Work:
    """The cells of a grid in a call of ``mosa isoflop run``."""

    def __init__(self, request: Request, plan: Plan, check_interruption: Callable[[], None] = lambda: None) -> None:
        """Begin without reading anything.

        Args:
            check_interruption: of ``signals_as_interrupt``.
        """
        self.request, self.plan, self.folder = request, plan, request.output
        self.check_interruption = check_interruption
        self.timings = request.timings
        self.launcher: Launcher = request.slurm or request.local
        self.failures: list[str] = []
        """Of evaluations and measurements in this call."""

        self.unmeasured = 0
        """Measurements that are left of those that ``measure`` began with."""

        self._running: list[_Running] = []
        self._is_stopping = False
        self._results: dict[str, dict[str, Any]] = {}
        self._tried: set[str] = set()  # in this call
        self._outdated: set[str] = set()  # gave up as they would not now
        self._said_at = time.monotonic()

    # --- what is known

    def cells(self) -> list[Cell]:
        return self.plan.all_cells(self.best)[0]

    def later(self) -> int:
        """Return the number of cells that will be known once learning rates have been chosen."""
        return self.plan.all_cells(self.best)[1]

    def best(self, trials: Sequence[Cell]) -> Cell | None:
        """Return the trial with the lowest validation loss, or None if not all have been run or none has a loss."""
        found = [(cell, self.result(cell)) for cell in trials]
        if any(result.get("status") not in results.SETTLED for _, result in found):
            return None
        losses = {cell.name: result["loss"] for cell, result in found if result.get("loss") is not None}
        return min((cell for cell in trials if cell.name in losses), key=lambda cell: losses[cell.name], default=None)

    def result(self, cell: Cell) -> dict[str, Any]:
        """Return the result of a cell, empty if it has none."""
        if cell.name in self._outdated:
            return {}
        if cell.name not in self._results:
            self._results[cell.name] = {}
            with suppress(OSError, ValueError):  # a damaged one is written again: its run is complete
                content = load_json(self.folder / "cells" / f"{cell.name}.json")
                self._results[cell.name] = known_values(Row, content)
        return self._results[cell.name]

    def without_a_rate(self) -> list[str]:
        """Return the names of the models of which every learning rate has diverged."""
        return [
            model.name
            for model in self.plan.models
            if all(map(self.is_settled, trials := self.plan.trials(model)))
            and len(trials) > 1
            and self.best(trials) is None
        ]

    def is_settled(self, cell: Cell) -> bool:
        return self.result(cell).get("status") in results.SETTLED

    def refuse_other_results(self) -> None:
        """Raise a UserError if a cell has taken steps in another way or on another dataset.

        One that gave up, and now has other ``resilience`` settings or no injected fault, is trained from its start.
        """
        starts, outdated = self._starts(), set[str]()
        for cell in self.cells():
            path, config = self.folder / "configs" / f"{cell.name}.yaml", cell.config(self.folder)
            if not self.is_settled(cell) and not (config.run.path / "metrics.jsonl").is_file():
                continue  # a failure whose cause may have been the configuration
            fix = "give another --output, or rename the size, corpus or member"
            changes = _changes(path, config)
            if changes and self.result(cell).get("status") == results.GAVE_UP and all(map(_ends_runs, changes)):
                outdated.add(cell.name)
                continue
            for key, (theirs, ours) in changes.items():
                raise UserError(
                    f"--output={self.folder} holds another grid's results: {cell.name} was run with {key}={theirs}, "
                    f"now {ours}; set {key}: {theirs} under overrides, {fix}"
                )
            ranks = self.request.grid.processes
            for start in starts:
                if start.cell == cell.name and start.processes not in (None, ranks):
                    raise UserError(
                        f"--output={self.folder} holds results of other processes: {cell.name} was run with "
                        f"processes={start.processes}, now {ranks}; set processes: {start.processes}, {fix}"
                    )
            data = cell.model.dataset
            if (used := self.result(cell).get("dataset_hash", data.fingerprint)) != data.fingerprint:
                raise UserError(
                    f"--output={self.folder} holds results of another dataset: {data.path} had the hash {used[:12]} "
                    f"when {cell.name} was run, now {data.fingerprint[:12]}; {fix}"
                )
        self._outdated = outdated

    def summary(self) -> str:
        """Return how many cells there are, and how many are left."""
        cells, later = self.plan.all_cells(self.best)
        done = sum(map(self.is_settled, cells))
        return f"{counted(len(cells) + later, 'cell')}: {done} done, {len(cells) + later - done} to train"

    def rows(self) -> list[Row]:
        """Return the rows of all known cells, trained or not."""
        grid = self.request.grid
        found = []
        for cell in self.cells():
            row = planned_row(cell, self.folder, grid.equal, grid.relative_to, grid.processes)
            row = replace(row, **self.result(cell))
            config, vocab_size = cell.model.config, cell.model.dataset.vocab_size
            if (timing := self.timings.find_anywhere(config, vocab_size)) is not None:
                row = replace(
                    row,
                    step_seconds=timing.seconds,
                    step_alone=True,
                    step_device=timing.device,
                    peak_memory_gib=timing.peak_memory_gib,
                )
            found.append(self._with_evaluation(row, cell) if row.status == results.DONE else row)
        return found

    def _with_evaluation(self, row: Row, cell: Cell) -> Row:
        """Add what was measured of a trained cell besides its loss, and the reason for what was not."""
        asked = self.request.grid.evaluation
        if asked is None:
            return row
        has_checkpoint = self._has_checkpoint(cell)
        missing = "not measured yet" if has_checkpoint else "not measured as `evaluate` asks, and no checkpoint is left"
        reasons: dict[str, str] = dict.fromkeys(results.EVALUATED, missing)
        if (found := results.evaluated(self._evaluation_path(cell), asked)) is not None:
            values, reasons = found
            row = replace(row, **values)
        decoding = self.timings.find_decoding(cell.model, asked)
        if decoding is not None:
            times, context = dict(decoding.milliseconds), decoding.context
            row = replace(row, decode_ms=times, decode_context=context, decode_device=decoding.device)
        elif asked.decode:
            reasons["decode_ms"] = missing if row.causal else results.CANNOT_DECODE
        return replace(row, not_measured=reasons)

    # --- training, with the evaluation of what has been trained

    def train(self) -> str:
        """Train and evaluate what has not been yet; return why it was stopped early, if it was."""
        try:
            while True:
                self.check_interruption()
                self._reap()
                if self._is_late():
                    return OUT_OF_TIME
                for start in self._startable()[: self.request.jobs - len(self._running)]:
                    start()
                if not self._running:
                    return ""
                self._say()
                time.sleep(_POLL_SECONDS)
        finally:
            self._stop()

    def _is_late(self) -> bool:
        return self.request.deadline is not None and time.time() > self.request.deadline

    def _startable(self) -> list[Callable[[], None]]:
        """Return what can be started, evaluations first: they free disk space."""
        cells = self.cells()
        found: list[Callable[[], None]] = []
        if self.request.slurm is None:
            untried = (cell for cell in cells if self._evaluation_path(cell).name not in self._tried)
            found += [partial(self._start_evaluation, cell) for cell in untried if self._is_to_evaluate(cell)]
        if self.request.trains:
            waiting = (cell for cell in cells if not self.is_settled(cell) and cell.name not in self._tried)
            found += [partial(self._start_training, cell) for cell in waiting]
        return found

    def _start_training(self, cell: Cell) -> None:
        self._tried.add(cell.name)
        if cell.name in self._outdated:
            self._remove(cell)
        config, path = cell.config(self.folder), self.folder / "configs" / f"{cell.name}.yaml"
        save_config(config, path)
        launcher, log_begin = self.launcher, self._log_size(cell)
        handle = launcher.start(cell.name, path, config.run.path, self._log(cell))
        start = _Start(
            cell.name, time.time(), launcher.is_alone, launcher.device, versions(*_PACKAGES), launcher.processes
        )
        path = self._starts_path
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(start)) + "\n")
        self._running.append(_Running(cell, handle, self._settle_training, self._log(cell), log_begin))
        say(f"{self._counter()} {cell.name}: training")

    def _settle_training(self, ended: _Running, code: int) -> None:
        """Write the result of a cell whose processes have ended, if they have ended for good."""
        cell, config = ended.cell, ended.cell.config(self.folder)
        tokens = config.train.global_batch_size * config.data.sequence_length
        found = results.measured(config.run.path, config.train.steps, tokens) if code == DONE else None
        if found is not None and found["loss"] is not None:
            result = {"status": results.DONE, **found}
            label = "" if found["causal"] else ", NON-CAUSAL"
            said = f"loss {found['loss']:.4f}, perplexity {decimals(found['perplexity'])}{label}"
        elif code == GAVE_UP or found is not None:
            result = {"status": results.GAVE_UP, "reason": ended.reason}
            said = f"diverged: {result['reason']}"
        elif self._is_stopping or code in (STOPPED, INTERRUPTED):
            say(f"{cell.name}: stopped; the same command continues it")
            return
        else:
            result = {"status": results.FAILED, "reason": f"exit code {code}: {ended.reason}"}
            said = f"failed: {result['reason']}"
        starts = [start for start in self._starts() if start.cell == cell.name]
        result |= {
            "config_hash": config_hash(config),
            "dataset_hash": cell.model.dataset.fingerprint,
            "starts": len(starts),
            "step_alone": all(start.alone for start in starts),
            "device": ", ".join(dict.fromkeys(start.device for start in starts)),
            "versions": versions(*_PACKAGES),
            "finished": time.time(),
        }
        path = self.folder / "cells" / f"{cell.name}.json"
        write_atomically(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
        self._results[cell.name] = result
        self._write()
        say(f"{self._counter()} {cell.name}: {said}")

    def _is_to_evaluate(self, cell: Cell) -> bool:
        asked = self.request.grid.evaluation
        return (
            asked is not None
            and self.result(cell).get("status") == results.DONE
            and results.evaluated(self._evaluation_path(cell), asked) is None
            and self._has_checkpoint(cell)
        )

    def _start_evaluation(self, cell: Cell) -> None:
        asked, path, run = self.request.grid.evaluation, self._evaluation_path(cell), self._run(cell)
        assert asked is not None
        self._tried.add(path.name)
        arguments = ["evaluate", str(run), "--lengths", "", "--samples", str(asked.samples)]
        arguments += ["--calibration-samples", str(asked.calibration_samples)]
        arguments += ["--output", str(path.with_suffix(".new"))]
        log_begin = self._log_size(cell)
        handle = self.request.local.launch(arguments, run, self._log(cell), ranks=1)
        self._running.append(_Running(cell, handle, self._settle_evaluation, self._log(cell), log_begin))
        say(f"{self._counter()} {cell.name}: evaluating")

    def _settle_evaluation(self, ended: _Running, code: int) -> None:
        cell, path = ended.cell, self._evaluation_path(ended.cell)
        if code == DONE:
            path.with_suffix(".new").replace(path)
            self._write()
        elif not self._is_stopping:
            self._fail(f"{cell.name}: mosa evaluate failed with exit code {code}: {ended.reason}")

    def _reap(self) -> None:
        for one in list(self._running):
            if (code := one.handle.poll()) is not None:
                self._running.remove(one)
                one.settle(one, code)

    def _stop(self) -> None:
        """Have all that runs save and end."""
        self._is_stopping = True
        self.launcher.stop([one.handle for one in self._running])
        self._reap()

    # --- what is measured alone

    def measure(self) -> str:
        """Measure the step and decoding of each trained model, one at a time on each device.

        Returns:
            Why it was stopped early, if it was.
        """
        waiting = list(self._measurements())
        total, free, running = len(waiting), list(self.request.local.slots), dict[str, Measurement]()
        try:
            while waiting or running:
                self.check_interruption()
                if self._is_late():
                    return OUT_OF_TIME
                while waiting and free:
                    text, start = waiting.pop(0)
                    slot = free.pop(0)
                    say(f"[{total - len(waiting)}/{total}] {text}")
                    running[slot] = start(slot)
                for slot, measurement in list(running.items()):
                    if not measurement.is_running():
                        del running[slot]
                        free.append(slot)
                        self._finish(measurement)
                time.sleep(_POLL_SECONDS)
        finally:
            self.unmeasured = len(waiting) + len(running)
            for measurement in running.values():
                measurement.stop()
        return ""

    def _measurements(self) -> Iterator[tuple[str, Callable[[str], Measurement]]]:
        """Yield what is left to measure: a description, and a function that begins it in a slot.

        Decoding first: it needs checkpoints, which may not be kept for long.
        """
        for cell in self._to_decode():
            model, asked = cell.model, self.request.grid.evaluation
            assert asked is not None
            start = partial(self.timings.start_decoding, model, asked, self._run(cell))
            yield f"{model.name}: measuring decoding alone", start
        seen = set[Path]()
        for cell in filter(self.is_settled, self.cells()):
            config, vocab_size = cell.model.config, cell.model.dataset.vocab_size
            path = self.timings.path(config, vocab_size)
            if path not in seen and self.timings.find(config, vocab_size) is None:
                seen.add(path)
                yield f"{cell.model.name}: measuring a step alone", partial(self.timings.start, config, vocab_size)

    def _to_decode(self) -> list[Cell]:
        """Return a cell with a checkpoint for each model whose decoding has not been measured."""
        asked = self.request.grid.evaluation
        found: dict[Path, Cell] = {}
        if asked is not None and asked.decode:
            for cell in self.cells():
                model, result = cell.model, self.result(cell)
                is_causal = result.get("causal", not looks_ahead(model.config))
                if result.get("status") != results.DONE or not is_causal or not self._has_checkpoint(cell):
                    continue
                if self.timings.find_decoding(model, asked, elsewhere=False) is None:
                    found.setdefault(self.timings.decoding_path(model, asked), cell)
        return list(found.values())

    def _finish(self, measurement: Measurement) -> None:
        try:
            measurement.finish()
        except RunError as error:
            self._fail(str(error))
        self._write()

    # --- files

    def _write(self) -> None:
        write_results(self.rows(), self.folder)
        self.remove_checkpoints()

    def remove_checkpoints(self) -> None:
        """With ``removes_checkpoints``, remove the checkpoints that nothing needs any more."""
        if not self.request.removes_checkpoints:
            return
        kept = {cell.name for cell in self._to_decode()} | {one.cell.name for one in self._running}
        for cell in filter(self.is_settled, self.cells()):
            if cell.name not in kept and not self._is_to_evaluate(cell):
                shutil.rmtree(self._run(cell) / "checkpoints", ignore_errors=True)

    def _remove(self, cell: Cell) -> None:
        """Remove a run and its result, in an order that can be interrupted: without the run, no step counts."""
        starts = [asdict(start) for start in self._starts() if start.cell != cell.name]
        write_atomically(self._starts_path, "".join(json.dumps(start) + "\n" for start in starts))
        shutil.rmtree(self._run(cell), ignore_errors=True)
        (self.folder / "cells" / f"{cell.name}.json").unlink(missing_ok=True)
        self._outdated.remove(cell.name)
        self._results.pop(cell.name, None)

    def _fail(self, message: str) -> None:
        self.failures.append(message)
        say(message)

    def _run(self, cell: Cell) -> Path:
        return self._config(cell).run.path

    def _config(self, cell: Cell) -> Config:
        return cell.config(self.folder)

    def _has_checkpoint(self, cell: Cell) -> bool:
        return bool(published_checkpoints(self._run(cell) / "checkpoints"))

    def _evaluation_path(self, cell: Cell) -> Path:
        return self.folder / "evaluations" / f"{cell.name}.json"

    def _log(self, cell: Cell) -> Path:
        return self.folder / "logs" / f"{cell.name}.log"

    def _log_size(self, cell: Cell) -> int:
        return log.stat().st_size if (log := self._log(cell)).is_file() else 0

    @property
    def _starts_path(self) -> Path:
        return self.folder / "starts.jsonl"

    def _starts(self) -> list[_Start]:
        found, path = [], self._starts_path
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for line in text.splitlines():
            with suppress(ValueError):  # cut off by a crash
                found.append(read_record(_Start, parse_json(line)))
        return found

    # --- progress

    def _counter(self) -> str:
        cells, later = self.plan.all_cells(self.best)
        return f"[{sum(map(self.is_settled, cells))}/{len(cells) + later}]"

    def _say(self) -> None:
        """Print what runs, at most every half a minute."""
        if time.monotonic() - self._said_at < _LINE_SECONDS:
            return
        self._said_at = time.monotonic()
        parts = []
        for one in self._running:
            config = self._config(one.cell)
            if self.is_settled(one.cell):
                parts.append(f"{one.cell.name} evaluating")
                continue
            status = read_status(config.run.path) or {}
            loss = f", loss {status['loss']:.3f}" if isinstance(status.get("loss"), float) else ""
            parts.append(f"{one.cell.name} at step {status.get('step', 0)} of {config.train.steps}{loss}")
        say(f"{self._counter()} {'; '.join(parts)}")


def _changes(path: Path, config: Config) -> dict[str, tuple[str, str]]:
    """Return what determines a run's result and has changed since its configuration was written: before, and now."""
    if not path.is_file():
        return {}
    before, now = map(what_determines_the_result, (load_config(path, checks_batches=False), config))
    return {key: (theirs, ours) for key, theirs, ours in difference(before, now)}


def _ends_runs(key: str) -> bool:
    """Return whether a key decides when a run gives up."""
    return key.startswith(("resilience.", "fault_injection."))
