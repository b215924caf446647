"""``mosa isoflop run``: trains the cells of a grid, each in processes of its own, and keeps their results.

    grid.json          what all results in the folder share
    configs/CELL.yaml  the resolved configuration of a cell
    runs/CELL/         its run directory
    logs/CELL.log      the output of its starts
    cells/CELL.json    its result, once it has ended
    starts.jsonl       every start of a cell
    timings/           steps measured alone

A cell without a result is started again, and goes on from its checkpoint if it has one.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosa.config import Config, difference, load_config, save_config, summary
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.exit_codes import DONE, GAVE_UP, INTERRUPTED, STOPPED
from megatron_mosa.resilience import read_status
from megatron_mosa.tools.grid import results
from megatron_mosa.tools.grid.budget import Cost
from megatron_mosa.tools.grid.grid import Grid
from megatron_mosa.tools.grid.launch import Handle, Launcher, LocalLauncher, SlurmLauncher
from megatron_mosa.tools.grid.plan import Cell, Corpus, Plan, config_hash, plan_models
from megatron_mosa.tools.grid.results import Row, planned_row, write_results
from megatron_mosa.tools.grid.timing import Timings, last_line
from megatron_mosa.tools.processes import alone_in, sigterm_as_interrupt
from megatron_mosa.utils import naming, versions, write_atomically

_PACKAGES = ("torch", "megatron-core", "deepspeed", "triton")
_POLL_SECONDS = 0.2
_LINE_SECONDS = 30.0  # between two lines of progress


@dataclass(frozen=True)
class Request:
    """Settings of a call; they do not change what a cell computes."""

    grid: Grid
    output: Path
    jobs: int
    """Cells at once."""

    local: LocalLauncher
    """Of this machine; it also measures steps."""

    slurm: SlurmLauncher | None = None
    """Where cells run instead."""

    deadline: float | None = None
    """Unix time at which cells are stopped."""

    measure: bool = False
    """Measure the step of each model alone, once all cells are done."""

    steps: int = 20
    warmup: int = 5
    """Of these measurements."""

    @property
    def timings(self) -> Timings:
        local = self.local
        return Timings(
            self.output,
            local.device,
            self.steps,
            self.warmup,
            lambda arguments: local.command(arguments, local.slots[0], 1),
        )

    def plan(self) -> Plan:
        """Return all models; if they are to take equal time, it is measured now.

        Raises:
            UserError: as ``plan_models``.
        """

        def seconds(config: Config, vocab_size: int) -> float:
            known = self.timings.find(config, vocab_size)
            found = self.timings.measure(config, vocab_size).seconds
            if known is None:
                print(f"{summary(config)}: {1000 * found:.1f} ms a step", flush=True)
            return found

        def cost_of(equal: str, data: Corpus) -> Cost:
            return Cost(equal, lambda config: seconds(config, data.vocab_size))

        return Plan(plan_models(self.grid, cost_of if self.measures_first else None))

    @property
    def measures_first(self) -> bool:
        """Whether numbers of heads depend on measurements."""
        return self.grid.equal == "step_time"


def run_grid(request: Request) -> list[Row]:
    """Train the cells that have no result yet, write the results, and return their rows.

    However it ends, results stay, and cells that were stopped go on in the next call.

    Raises:
        UserError: the grid cannot work, or the folder holds something else.
        RunError: it was stopped, or cells failed.
    """
    plan = None if request.measures_first else request.plan()  # mistakes come before anything is written
    with alone_in(request.output, "mosa isoflop run"), sigterm_as_interrupt():
        prepare_output(request.output, request.grid)
        work = _Work(request, plan or request.plan())
        work.refuse_other_results()
        stopped = ""
        try:
            work.print_known()
            stopped = work.train()
            if request.measure and not stopped:
                work.measure()
        except KeyboardInterrupt:
            stopped = "stopped"
        finally:
            rows = work.rows()
            write_results(rows, request.output)
    print(f"Wrote {results.RESULTS} and results.csv to {request.output}; mosa report {request.output} reports on them")
    _refuse_unfinished(rows, work.later(), stopped, work.without_a_rate())
    return rows


def _refuse_unfinished(rows: Sequence[Row], later: int, stopped: str, without_a_rate: Sequence[str]) -> None:
    again = "run the same command again to go on"
    missing = sum(row.status == results.MISSING for row in rows) + later
    if stopped:
        raise RunError(f"{stopped} with {missing} of {len(rows) + later} cells left; {again}")
    if failed := [row for row in rows if row.status == results.FAILED]:
        first = failed[0]
        raise RunError(f"{len(failed)} of {len(rows)} cells failed; {first.cell}: {first.reason}; mend it, and {again}")
    if without_a_rate:
        raise RunError(f"all learning rates of {', '.join(without_a_rate)} diverged; add lower ones, and {again}")
    if missing:
        raise RunError(f"{missing} of {len(rows) + later} cells have no result; {again}")


def prepare_output(folder: Path, grid: Grid) -> None:
    """Create the folder of a grid, or check that it is this grid's.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    file, identity = folder / "grid.json", {"name": grid.name, "equal": grid.equal, "relative_to": grid.relative_to}
    fix = "give another --output, or remove the directory"
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output={folder} is a file; give a directory")
        if file.is_file():
            try:
                earlier = json.loads(file.read_text(encoding="utf-8"))
                differ = [key for key, value in identity.items() if earlier[key] != value]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"--output={folder}: its grid.json is damaged; {fix}") from None
            for key in differ:
                raise UserError(
                    f"--output={folder} holds another grid's results: {key}={earlier[key]}, now {identity[key]}; {fix}"
                )
        elif folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--output={folder} is not empty and does not hold a grid; give another directory")
        for name in ("configs", "cells", "logs", "runs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(identity, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"could not write to --output={folder} ({error.strerror}); give another directory") from None


class _Work:
    """The cells of a grid, what is known of them, and those that run."""

    def __init__(self, request: Request, plan: Plan) -> None:
        self.request, self.plan, self.folder = request, plan, request.output
        self.timings = request.timings
        self.launcher: Launcher = request.slurm or request.local
        self.running: list[tuple[Cell, Handle]] = []
        self._is_stopping = False
        self._results: dict[str, dict[str, Any]] = {}
        self._tried: set[str] = set()  # in this call
        self._said_at = time.monotonic()

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
        if cell.name not in self._results:
            self._results[cell.name] = {}
            with suppress(OSError, ValueError):  # a damaged one is written again: its run is complete
                path = self.folder / "cells" / f"{cell.name}.json"
                self._results[cell.name] = json.loads(path.read_text(encoding="utf-8"))
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
        """Raise a UserError if a cell has taken steps with another configuration or on another dataset."""
        for cell in self.cells():
            path, config = self.folder / "configs" / f"{cell.name}.yaml", cell.config(self.folder)
            if not self.is_settled(cell) and not (config.run.path / "metrics.jsonl").is_file():
                continue  # a failure whose cause may have been the configuration
            fix = "give another --output, or rename the size, corpus or member"
            if path.is_file() and config_hash(before := load_config(path, checks_batches=False)) != config_hash(config):
                key, theirs, ours = next(
                    (key, *pair)
                    for key, *pair in difference(before, config)
                    if not key.startswith(("run.", "checkpoint."))
                )
                raise UserError(
                    f"--output={self.folder} holds another grid's results: {cell.name} was run with {key}={theirs}, "
                    f"now {ours}; {fix}"
                )
            data = cell.model.dataset
            if (used := self.result(cell).get("dataset_hash", data.fingerprint)) != data.fingerprint:
                raise UserError(
                    f"--output={self.folder} holds results of another dataset: {data.path} had the hash {used[:12]} "
                    f"when {cell.name} was run, now {data.fingerprint[:12]}; {fix}"
                )

    def print_known(self) -> None:
        """Print the plan: each model with its heads and its share of the budget, and how many cells are left."""
        print(table(self.plan))
        cells, later = self.plan.all_cells(self.best)
        done = sum(map(self.is_settled, cells))
        print(f"{len(cells) + later} cells: {done} done, {len(cells) + later - done} to train", flush=True)

    def train(self) -> str:
        """Train what has no result; return why it was stopped early, if it was."""
        try:
            while True:
                self._reap()
                if self.request.deadline is not None and time.time() > self.request.deadline:
                    return "out of time"
                waiting = [cell for cell in self.cells() if not self.is_settled(cell) and cell.name not in self._tried]
                for cell in waiting[: self.request.jobs - len(self.running)]:
                    self._start(cell)
                if not self.running:
                    return ""
                self._say()
                time.sleep(_POLL_SECONDS)
        finally:
            self._stop()

    def _start(self, cell: Cell) -> None:
        self._tried.add(cell.name)
        config, path = cell.config(self.folder), self.folder / "configs" / f"{cell.name}.yaml"
        save_config(config, path)
        launcher = self.launcher
        handle = launcher.start(cell.name, path, config.run.path, self.folder / "logs" / f"{cell.name}.log")
        start = {"cell": cell.name, "time": time.time(), "alone": launcher.is_alone, "device": launcher.device}
        path = self.folder / "starts.jsonl"
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(start | {"versions": versions(*_PACKAGES)}) + "\n")
        self.running.append((cell, handle))
        print(f"{self._counter()} {cell.name}: training", flush=True)

    def _reap(self) -> None:
        for cell, handle in list(self.running):
            if (code := handle.poll()) is not None:
                self.running.remove((cell, handle))
                self._settle(cell, code)

    def _settle(self, cell: Cell, code: int) -> None:
        """Write the result of a cell whose processes have ended, if they have ended for good."""
        config, log = cell.config(self.folder), self.folder / "logs" / f"{cell.name}.log"
        tokens = config.train.global_batch_size * config.data.sequence_length
        found = results.measured(config.run.path, config.train.steps, tokens) if code == DONE else None
        if found is not None and found["loss"] is not None:
            result = {"status": results.DONE, **found}
            label = "" if found["causal"] else ", NON-CAUSAL"
            said = f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}{label}"
        elif code == GAVE_UP or found is not None:
            result = {"status": results.GAVE_UP, "reason": last_line(log)}
            said = f"diverged: {result['reason']}"
        elif self._is_stopping or code in (STOPPED, INTERRUPTED):
            print(f"{cell.name}: stopped; the same command goes on with it", flush=True)
            return
        else:
            result = {"status": results.FAILED, "reason": f"exit code {code}: {last_line(log)}"}
            said = f"failed: {result['reason']}"
        starts = [start for start in self._starts() if start["cell"] == cell.name]
        result |= {
            "config_hash": config_hash(config),
            "dataset_hash": cell.model.dataset.fingerprint,
            "starts": len(starts),
            "step_alone": all(start["alone"] for start in starts),
            "device": ", ".join(dict.fromkeys(start["device"] for start in starts)),
            "versions": versions(*_PACKAGES),
            "finished": time.time(),
        }
        path = self.folder / "cells" / f"{cell.name}.json"
        write_atomically(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
        self._results[cell.name] = result
        write_results(self.rows(), self.folder)
        print(f"{self._counter()} {cell.name}: {said}", flush=True)

    def _starts(self) -> list[dict[str, Any]]:
        found = []
        for line in (self.folder / "starts.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # cut off by a crash
                found.append(json.loads(line))
        return found

    def _stop(self) -> None:
        """Have all running cells save and end."""
        self._is_stopping = True
        self.launcher.stop([handle for _, handle in self.running])
        self._reap()

    def _counter(self) -> str:
        cells, later = self.plan.all_cells(self.best)
        return f"[{sum(map(self.is_settled, cells))}/{len(cells) + later}]"

    def _say(self) -> None:
        """Print what runs, at most every half a minute."""
        if time.monotonic() - self._said_at < _LINE_SECONDS:
            return
        self._said_at = time.monotonic()
        parts = []
        for cell, _ in self.running:
            config = cell.config(self.folder)
            status = read_status(config.run.path) or {}
            loss = f", loss {status['loss']:.3f}" if isinstance(status.get("loss"), float) else ""
            parts.append(f"{cell.name} at step {status.get('step', 0)} of {config.train.steps}{loss}")
        print(f"{self._counter()} {'; '.join(parts)}", flush=True)

    def measure(self) -> None:
        """Measure the step of each model alone."""
        models = list({id(cell.model): cell.model for cell in self.cells() if self.is_settled(cell)}.values())
        for number, model in enumerate(models, 1):
            print(f"[{number}/{len(models)}] {model.name}: measuring a step alone", flush=True)
            self.timings.measure(model.config, model.dataset.vocab_size)

    def rows(self) -> list[Row]:
        """Return the rows of all known cells, trained or not."""
        grid = self.request.grid
        found = []
        for cell in self.cells():
            row = planned_row(cell, self.folder, grid.equal, grid.relative_to, grid.processes)
            row = replace(row, **self.result(cell))
            timing = self.timings.find_anywhere(cell.model.config, cell.model.dataset.vocab_size)
            if timing is not None:
                row = replace(
                    row,
                    step_seconds=timing.seconds,
                    step_alone=True,
                    peak_memory_gib=timing.peak_memory_gib,
                    device=timing.device if row.device.startswith("Slurm") else row.device,  # its card is not known
                )
            found.append(row)
        return found


def table(plan: Plan) -> str:
    """Return a line for each model: heads, and how far it is from equal."""
    names = [model.name for model in plan.models]
    width = max(map(len, names))
    lines = [f"{'model':{width}}  {'heads':>12}  of the budget  runs"]
    for model, name in zip(plan.models, names, strict=True):
        dense = model.config.model.num_dense_heads
        heads = f"{dense} + {model.heads}" if model.is_sparse else str(model.heads)
        cells, later = plan.cells(model, lambda trials: None)
        count = len(cells) + later
        lines.append(f"{name:{width}}  {heads:>12}  {100 * model.share:11.2f} %  {count:4}")
    return "\n".join(lines)


def cpu_name() -> str:
    """Return the name of this machine's processor."""
    return platform.processor() or platform.machine() or "cpu"
