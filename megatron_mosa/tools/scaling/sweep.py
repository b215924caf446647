"""``mosa sweep``: layouts and numbers of processes compared on one model, from the same weights on the same data.

The weights are a function of ``run.seed`` alone (``model.initial_weights``), so every cell draws the same ones. This
module decides what is missing in the output directory, has sessions measure it (``session``), and writes the report.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosa.config import Config, config_to_dict
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.tools.processes import alone_in, sigterm_as_interrupt
from megatron_mosa.tools.scaling.cells import Cell, fp32_reference, reference_cell
from megatron_mosa.tools.scaling.memory import Card, card, host_gib, least_gib
from megatron_mosa.tools.scaling.rows import Row, Sweep, make_rows
from megatron_mosa.tools.scaling.session import (
    Event,
    LocalLaunch,
    Session,
    Watch,
    is_measured,
    read_result,
    supervise,
)
from megatron_mosa.tools.scaling.sweep_report import NORM_TOLERANCE, TOLERANCE, write_report
from megatron_mosa.tools.scaling.sweep_worker import other_card
from megatron_mosa.utils import versions, write_atomically

PACKAGES = ("torch", "megatron-core", "deepspeed")  # that, with this project, determine a result
_OWN = (
    "request.json", "results.csv", "results.md", "scaling.png", "breakdown.png", "jobs", "layouts", "logs", "seed",
)  # fmt: skip
_LINE_SECONDS = 10.0  # between two lines of progress within a phase

Run = Callable[[list[Session], Watch], None]
"""Has the sessions measured, one after the other or at once, and reports their events."""


@dataclass(frozen=True)
class Request:
    """Settings of a sweep."""

    config: Config
    cells: Sequence[Cell]
    warmup: int
    steps: int
    output: Path
    command: str
    """The command line that repeats the sweep; for the report."""

    device: str
    """"cpu" or "cuda"."""

    weak: int | None = None
    """Samples per process of weak scaling."""

    fp32_reference: bool = False
    """Compare with one process in fp32, computed deterministically, instead of the configuration's precision."""

    random_tokens: bool = False
    memory_gib: float | None = None
    """Memory of a device; None: this machine's."""

    deadline: float | None = None
    """Unix time at which the sweep stops."""

    session_per_cell: bool = False
    beside: tuple[Path, ...] = ()
    """Directories of other sweeps to compare with."""

    def identity(self, dataset: dict[str, Any]) -> dict[str, Any]:
        """Return what all results in one directory must share; without the cells, as more may be added."""
        config = config_to_dict(self.config)
        for key in ("checkpoint", "logging", "validation"):  # no step depends on them
            del config[key]
        config["run"] = {"seed": self.config.run.seed}
        config["train"].pop("micro_batch_size")
        config["train"].pop("stop_after_step")
        config["parallel"] = {
            key: value
            for key, value in config["parallel"].items()
            if key not in ("tensor_model_parallel_size", "sequence_parallel", "zero_stage", "tensor_parallel_overlap")
        }
        numbers = {"warmup": self.warmup, "steps": self.steps, "device": self.device}
        numbers["random-tokens"] = self.random_tokens
        return {"request": numbers, **config, "dataset": dataset, "versions": versions(*PACKAGES)}


def run_sweep(request: Request, run: Run | None = None, force: bool = False) -> Sweep:
    """Measure the cells that have no result yet, write the report, and return it.

    However it ends, finished cells stay and are in the report.

    Args:
        run: by default one session after the other, on this machine.

    Raises:
        UserError: a problem with the dataset, or an output directory that holds something else.
        RunError: no cell could be measured, time ran out, or losses or gradient norms deviate from the reference's.
    """
    base = replace(
        request.config, run=replace(request.config.run, directory=str(request.output.absolute()), name="sweep")
    )
    dataset, vocab_size = _dataset(request, base)
    identity = request.identity(dataset)
    here = card() if request.device == "cuda" and run is None else None
    others = tuple((path, read_sweep(path, request, identity)) for path in request.beside)
    with alone_in(request.output, "mosa sweep"):
        prepare_output(request.output, identity, force)
        work = _Work(request, base, vocab_size, here)
        if here is not None:
            work.refuse_other_cards(here)
        work.print_known()
        error: BaseException | None = None
        try:
            with sigterm_as_interrupt():
                if sessions := work.sessions():
                    (run or _run_here(sessions))(sessions, work.watch)
        except (KeyboardInterrupt, RunError) as caught:
            error = caught
        sweep = replace(work.sweep(), beside=others)
        files = write_report(sweep, request.output)
    print(f"Wrote {', '.join(files[:-1])} and {files[-1]} to {request.output}")
    if isinstance(error, KeyboardInterrupt):
        raise RunError("stopped; run the same command again to measure what is missing") from None
    if error is not None:
        raise error
    _refuse_unfinished(sweep)
    _refuse_deviations(sweep)
    return sweep


def plan(request: Request) -> list[tuple[Cell, float, str]]:
    """Return every cell of a sweep with the GiB that a rank needs at least, and why it will not be run, if so."""
    here = card() if request.device == "cuda" else None
    work = _Work(request, request.config, request.config.data.vocab_size, here)
    return [(cell, work.least(cell), work.too_large.get(cell, "")) for cell in work.cells]


def _dataset(request: Request, base: Config) -> tuple[dict[str, Any], int]:
    """Check the dataset; return its identity and its vocabulary."""
    if request.random_tokens:
        return {}, base.data.vocab_size
    from megatron_mosa.train import check_start

    cell = request.cells[0]
    # On a GPU the workers check it: here it would take some of the memory that they measure.
    start = check_start(cell.apply(base), cell.processes, checks_devices=request.device == "cpu")
    return start.data_identity, start.manifest.vocab_size


class _Work:
    """The cells of one sweep, what is known of them, and their progress on the terminal."""

    def __init__(self, request: Request, base: Config, vocab_size: int, here: Card | None) -> None:
        self.request, self.base, self.vocab_size = request, base, vocab_size
        self.folder = request.output
        self.memory_gib = request.memory_gib or (here.gib if here else None)
        self.too_large: dict[Cell, str] = {}
        cells = list(request.cells)
        self.reference = fp32_reference(base, cells) if request.fp32_reference else reference_cell(base, cells)
        wanted = list(dict.fromkeys([self.reference, *cells]))
        for cell in wanted:
            if not is_measured(self.folder, cell.name) and (objection := self._no_room(cell)):
                self.too_large[cell] = objection
        if self.reference in self.too_large and self.reference not in cells:
            wanted.remove(self.reference)  # the smallest cell that fits takes its place
            del self.too_large[self.reference]
        self.cells = [*wanted, *(cell for cell in self._earlier() if cell not in wanted)]
        if all(cell in self.too_large for cell in wanted):
            raise UserError(f"no layout fits the memory: {wanted[0]}: {self.too_large[wanted[0]]}; use more processes")
        self.missing = [
            cell for cell in wanted if cell not in self.too_large and not is_measured(self.folder, cell.name)
        ]
        self._started = time.monotonic()
        self._shown: tuple[str, str] = ("", "")
        self._shown_at = 0.0
        self._done = 0

    def least(self, cell: Cell) -> float:
        return least_gib(cell.apply(self.base), self.vocab_size, cell.processes)

    def _no_room(self, cell: Cell) -> str:
        room = self.memory_gib
        if room is None and self.request.device == "cpu":
            room = host_gib() / cell.processes
        needed = self.least(cell)
        if room is None or needed <= room:
            return ""
        return f"needs at least {needed:.0f} GiB on each rank, which has {room:.0f}"

    def _earlier(self) -> list[Cell]:
        """Return the cells measured by earlier calls, in their order."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob("layouts/*.json")]
        found.sort(key=lambda result: result["finished"])
        return [Cell.from_dict(result["cell"]) for result in found if "reason" not in result]

    def refuse_other_cards(self, here: Card) -> None:
        """Raise a UserError if the directory holds results of another card."""
        for cell in self.cells:
            result = read_result(self.folder, cell.name)
            if result is not None and result.get("device", here.name) != here.name:
                raise UserError(other_card(self.folder, result["device"], here.name))

    def sessions(self) -> list[Session]:
        """Return what must be started: a session per number of processes, or per cell."""
        groups: dict[Any, list[Cell]] = {}
        # DeepSpeed's ZeRO-3 keeps its memory, so that the cell after it needs new processes.
        for cell in sorted(self.missing, key=lambda cell: (cell.processes, cell.layout.zero == 3)):
            key = cell if self.request.session_per_cell else (cell.processes, cell.fp32)
            groups.setdefault(key, []).append(cell)
        return [self._session(cells) for cells in groups.values()]

    def _session(self, cells: list[Cell]) -> Session:
        name = f"processes{cells[0].processes}{'-fp32' * cells[0].fp32}"
        return Session(
            name=cells[0].name if self.request.session_per_cell else name,
            folder=str(self.folder.absolute()),
            config=config_to_dict(self.base),
            cells=[cell.to_dict() for cell in cells],
            processes=cells[0].processes,
            warmup=self.request.warmup,
            steps=self.request.steps,
            random_tokens=self.request.random_tokens,
            deterministic=cells[0].fp32 or self.base.train.deterministic,
            deadline=self.request.deadline,
        )

    def print_known(self) -> None:
        """Print the cells that need not be run, and how many are left."""
        for row in self.rows():
            if row.is_measured or row.cell in self.too_large:
                print(f"{row.line}{' (kept)' if row.is_measured else ''}")
        print(f"{len(self.missing)} to measure", flush=True)

    def watch(self, event: Event) -> None:
        """Print what a session is doing: each phase, and within a phase at most one line in ten seconds."""
        cell = next((cell for cell in self.missing if cell.name == event.cell), None)
        if cell is None:
            return
        counter = f"[{min(self._done + 1, len(self.missing))}/{len(self.missing)}]"
        if event.phase in ("done", "failed"):
            self._done += 1
            row = next(row for row in self.rows() if row.cell == cell)
            left = (time.monotonic() - self._started) / self._done * (len(self.missing) - self._done)
            print(f"{counter} {row.line}; {left:.0f} s left", flush=True)
            return
        key, now = (event.cell, event.phase), time.monotonic()
        if key == self._shown and now - self._shown_at < _LINE_SECONDS:
            return
        self._shown, self._shown_at = key, now
        step = f", step {event.step}/{event.of}" if event.of else ""
        print(f"{counter} {cell}: {event.phase}{step}", flush=True)

    def rows(self) -> list[Row]:
        """Return the rows of all cells, measured or not."""
        results = []
        for cell in self.cells:
            result = read_result(self.folder, cell.name)
            if result is None:
                result = {"status": "missing", "reason": "not measured yet"}
            if cell in self.too_large:
                result = {"status": "too large", "reason": self.too_large[cell]}
            results.append((cell, result))
        return make_rows(results, self.base.train.global_batch_size, self.request.weak, self.reference)

    def sweep(self) -> Sweep:
        """Return what the report says."""
        request = self.request
        return Sweep(
            name=request.config.run.name,
            sequence_length=request.config.data.sequence_length,
            global_batch=request.config.train.global_batch_size,
            weak=request.weak,
            precision=request.config.train.precision,
            rows=self.rows(),
            device=request.device,
            command=request.command,
            versions=versions(*PACKAGES),
            random_tokens=request.random_tokens,
        )


def _run_here(sessions: Sequence[Session]) -> Run:
    # A session of one process uses as few threads per rank as the largest: with one per core, a busy machine slows it
    # down twenty-fold.
    launch = LocalLaunch(max(1, (os.cpu_count() or 1) // max(session.processes for session in sessions)))

    def run(sessions: list[Session], watch: Watch) -> None:
        for session in sessions:
            supervise(session, launch, watch)

    return run


def prepare_output(folder: Path, identity: dict[str, Any], force: bool) -> None:
    """Create the output directory, or check that it holds an earlier part of the same sweep.

    Args:
        identity: sections of keys, as returned by ``Request.identity``.

    Raises:
        UserError: it holds something else and ``force`` is not given, or it is not writable.
    """
    file = folder / "request.json"
    identity = json.loads(json.dumps(identity))
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output={folder} is a file; give a directory")
        if folder.is_dir() and any(folder.iterdir()) and not force:
            _refuse_another(folder, file, identity)
        if force:  # remove only a sweep's own files: the directory may hold others
            for path in map(folder.joinpath, _OWN):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for name in ("jobs", "layouts", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_atomically(file, json.dumps(identity, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"could not write to --output={folder} ({error.strerror}); give another directory") from None


def _refuse_another(folder: Path, file: Path, identity: dict[str, Any]) -> None:
    fix = "give another --output, or --force to remove its results"
    if not file.is_file():
        raise UserError(
            f"--output={folder} is not empty and does not hold a sweep; give another directory, or --force to write "
            "next to what is there"
        )
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"--output={folder}: its request.json is damaged; {fix}") from None
    if difference := _difference(earlier, identity):
        raise UserError(f"--output={folder} holds another sweep: {difference}; {fix}")


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Name the first key in which two identities differ, with both values."""
    for section, values in ours.items():
        for key, value in values.items():
            other = theirs.get(section, {}).get(key)
            if other != value:
                name = f"--{key}" if section == "request" else f"{section}.{key}"
                return f"{name}={other}, now {value}"
    return ""


def read_sweep(folder: Path, request: Request, identity: dict[str, Any]) -> Sweep:
    """Read a finished sweep to compare with: of the same model and data, on another card or with other versions.

    Raises:
        UserError: there is none, or it measured something else.
    """
    try:
        theirs = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("layouts/*.json"))]
        results, their_versions = [(Cell.from_dict(result["cell"]), result) for result in found], theirs["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--beside={folder} does not hold a sweep; give the --output of another one") from None
    ours = json.loads(json.dumps({key: value for key, value in identity.items() if key != "versions"}))
    if difference := _difference(theirs, ours):
        raise UserError(f"--beside={folder} measured something else: {difference}")
    batch = request.config.train.global_batch_size
    return Sweep(
        name=folder.name,
        sequence_length=request.config.data.sequence_length,
        global_batch=batch,
        weak=request.weak,
        precision=request.config.train.precision,
        rows=make_rows(results, batch, request.weak, None),
        device=request.device,
        command="",
        versions=their_versions,
    )


def _refuse_unfinished(sweep: Sweep) -> None:
    if not any(row.is_measured for row in sweep.rows):
        row = next((row for row in sweep.rows if row.status == "failed"), sweep.rows[0])
        raise RunError(f"no layout could be measured; {row.line}")
    if missing := [str(row.cell) for row in sweep.rows if row.status == "missing"]:
        raise RunError(f"not measured: {', '.join(missing)}; run the same command again to measure what is missing")


def _refuse_deviations(sweep: Sweep) -> None:
    for what, name, tolerance in (
        ("losses", "loss_deviation", TOLERANCE[sweep.precision]),
        ("gradient norms", "grad_norm_deviation", NORM_TOLERANCE[sweep.precision]),
    ):
        found = {row.cell: getattr(row, name) for row in sweep.rows}
        wrong = [f"{cell} ({value:.1e})" for cell, value in found.items() if value is not None and value > tolerance]
        if wrong:
            raise RunError(
                f"{what} deviate from the reference by more than {tolerance:g} ({sweep.precision}): {', '.join(wrong)}"
            )
