"""A session: cells of one number of processes, measured one after the other by the same worker processes.

The processes import once and build one engine after another. If one of them fails, or cannot free its memory, they are
started again for the cells that are left, so that a cell without room does not take the others with it. Everything goes
through the sweep's folder, so that a session may run anywhere that sees it:

    jobs/SESSION.json        the cells that are left
    jobs/SESSION.progress    what rank 0 is doing, one JSON object a line
    jobs/SESSION.error.rankN why a rank failed
    layouts/CELL.json        the result of a cell, as soon as it has one
    logs/SESSION-N.log       output of the Nth start

``python -m megatron_mosa.tools.scaling.session SESSION.json`` runs a session in a Slurm job, with srun in place of
torchrun. It does not import torch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosa.entry import run as run_program
from megatron_mosa.parallel import LOST_CONNECTION, job_port
from megatron_mosa.resilience import job_end
from megatron_mosa.tools.bench.measurement import check_measurement
from megatron_mosa.tools.processes import Process, end, start
from megatron_mosa.tools.scaling.cells import Cell
from megatron_mosa.tools.scaling.layouts import SweepLayout
from megatron_mosa.utils import counted, known_values, load_json, read_record, say, write_atomically

WORKER = "megatron_mosa.tools.scaling.sweep_worker"
NO_TIME = "not begun, for lack of time"
NO_MEMORY = "begins in new processes, as memory was left allocated"
STALL_SECONDS = 900.0
"""Time without an event, such as a step, after which a session counts as hung; the first step compiles."""

STALLED = 124  # timeout's exit code
_POLL_SECONDS = 0.2
_SECONDS_TO_END = 60.0  # between the last moment for a result and the end of a Slurm job

Launch = Callable[[Path, int, Path, int], Process]
"""(session file, processes, log file, number of this start) -> the launcher of the worker processes."""


@dataclass(frozen=True)
class Event:
    """A line of the progress file."""

    cell: str
    phase: str
    """What rank 0 is about to do, such as "building"; "done" after the result; NO_TIME or NO_MEMORY at the end."""

    step: int = 0
    of: int = 0
    """0: the phase has no steps."""


Watch = Callable[[Event], None]


@dataclass(frozen=True)
class Session:
    """The work of one start of the worker processes; plain JSON on disk."""

    name: str
    folder: str
    """The sweep's."""

    config: dict[str, Any]
    """The resolved configuration, to which the cells are applied."""

    cells: list[dict[str, Any]]
    processes: int
    warmup: int
    steps: int
    random_tokens: bool
    """Measure on random tokens; no dataset is read."""

    deterministic: bool
    deadline: float | None = None
    """Unix time after which no cell begins, nor one that would not be done by then; one that runs is ended."""

    @classmethod
    def read(cls, path: Path) -> Session:
        """Read what ``write`` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self) -> None:
        """Write the session's file."""
        write_atomically(self.file, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @property
    def file(self) -> Path:
        return Path(self.folder, "jobs", f"{self.name}.json")

    @property
    def progress(self) -> Path:
        return Path(self.folder, "jobs", f"{self.name}.progress")

    @property
    def errors(self) -> Path:
        """Prefix of the files in which ranks record why they failed."""
        return Path(self.folder, "jobs", f"{self.name}.error")

    def log(self, number: int) -> Path:
        """Return the log of the start with this number."""
        return Path(self.folder, "logs", f"{self.name}-{number}.log")


@dataclass(frozen=True)
class _Ended:
    """What every result of a cell has."""

    cell: dict[str, Any]
    finished: float
    wall_seconds: float | None = None


@dataclass(frozen=True)
class _Failure:
    """What the result of a cell that failed has besides."""

    reason: str
    status: str = "failed"


def result_path(folder: str | Path, cell: str) -> Path:
    """Return the file of a cell's result, by the cell's name."""
    return Path(folder, "layouts", f"{cell}.json")


def read_result(folder: str | Path, cell: str) -> dict[str, Any] | None:
    """Return a cell's result, or None; the result of a failure holds a ``reason``.

    None, too, if the file is damaged, so that the cell is measured again, or of another cell: earlier versions named
    layouts without overlap as those with it are now.
    """
    path = result_path(folder, cell)
    if not path.is_file():
        return None
    found = _read_file(path)
    return found[1] if found is not None and found[0].name == cell else None


def all_results(folder: str | Path) -> list[tuple[Cell, dict[str, Any]]]:
    """Return all cells with a result or a failure, in the order in which they ended; damaged files are left out."""
    found = [one for path in sorted(Path(folder, "layouts").glob("*.json")) if (one := _read_file(path)) is not None]
    return sorted(found, key=lambda one: one[1]["finished"])


def _read_file(path: Path) -> tuple[Cell, dict[str, Any]] | None:
    try:
        result = load_json(path)
        read_record(_Failure, result) if "reason" in result else check_measurement(result)
        if known_values(Cell, read_record(_Ended, result).cell)["processes"] < 1:
            raise ValueError("it ran on no process")
        known_values(SweepLayout, result["cell"]["layout"])
        return Cell.from_dict(result["cell"]), result
    except (OSError, ValueError, TypeError, KeyError):
        return None


def is_measured(folder: str | Path, cell: str) -> bool:
    """Whether there is a result that is not a failure."""
    result = read_result(folder, cell)
    return result is not None and "reason" not in result


def write_result(folder: str | Path, cell: Cell, result: dict[str, Any]) -> None:
    """Write a cell's result, or its failure."""
    content = {"cell": cell.to_dict(), "finished": time.time(), **result}
    write_atomically(result_path(folder, cell.name), json.dumps(content, indent=1, allow_nan=False) + "\n")


def other_card(folder: str | Path, theirs: str, ours: str) -> str:
    """Return the message for a folder with results of another card."""
    return (
        f"--output={folder} holds results of {theirs}, this is {ours}; give another --output, and "
        f"--beside {folder} to compare"
    )


class Tail:
    """Reads the events that a session has added to its progress file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def events(self) -> list[Event]:
        """Return the new events."""
        with suppress(FileNotFoundError):
            with self.path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._read:  # a new file of a job that was requeued
                    self._read = 0
                file.seek(self._read)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]  # a line may be half written
            self._read += len(whole)
            return [Event(**json.loads(line)) for line in whole.splitlines()]
        return []


def supervise(
    session: Session, launch: Launch, watch: Watch, check_interruption: Callable[[], None] = lambda: None
) -> None:
    """Run a session until each of its cells has a result or a failure, or its time is up.

    The worker processes are ended, if they still run, however this function ends.

    Args:
        check_interruption: of ``signals_as_interrupt``.
    """
    cells = map(Cell.from_dict, session.cells)
    left = [cell for cell in cells if not is_measured(session.folder, cell.name)]  # a job may have been requeued
    session.progress.unlink(missing_ok=True)
    tail = Tail(session.progress)
    number = len(list(session.log(1).parent.glob(f"{session.name}-*.log")))  # earlier logs stay
    while left and not _is_over(session):  # each start settles one cell or more
        number += 1
        for path in session.errors.parent.glob(f"{session.errors.name}.rank*"):
            path.unlink()
        for cell in left:
            result_path(session.folder, cell.name).unlink(missing_ok=True)  # an earlier failure
        session = replace(session, cells=[cell.to_dict() for cell in left])
        session.write()
        watch(Event(left[0].name, f"starting {counted(session.processes, 'process')}"))
        code, last = _run_once(session, launch, number, tail, watch, check_interruption)
        left = [cell for cell in left if not is_measured(session.folder, cell.name)]
        if code is None or (last is not None and last.phase == NO_TIME):
            return
        if not left or (last is not None and last.phase == NO_MEMORY):
            continue
        reason = failure(session.errors, session.log(number), code)
        at_fault = [cell for cell in left if last is not None and cell.name == last.cell]
        if last is None:
            at_fault = left  # the processes could not even begin
        # Otherwise they failed after a result, as they left its groups: the next cell is not to blame.
        for cell in at_fault:
            write_result(session.folder, cell, {"reason": reason})
            watch(Event(cell.name, "failed"))
        left = [cell for cell in left if cell not in at_fault]


def _is_over(session: Session) -> bool:
    return session.deadline is not None and time.time() > session.deadline


def _run_once(
    session: Session, launch: Launch, number: int, tail: Tail, watch: Watch, check_interruption: Callable[[], None]
) -> tuple[int | None, Event | None]:
    """Start the workers and wait; return the exit code and the last event.

    The code is None at the deadline, and STALLED if there was no event for too long.
    """
    process = launch(session.file, session.processes, session.log(number), number)
    last, heard = None, time.monotonic()
    try:
        while True:
            check_interruption()
            code = process.poll()
            for last in tail.events():
                heard = time.monotonic()
                watch(last)
            if code is not None or _is_over(session):
                return code, last
            if time.monotonic() - heard > STALL_SECONDS:
                return STALLED, last
            time.sleep(_POLL_SECONDS)
    finally:
        end(process)


def failure(errors: Path, log: Path, code: int) -> str:
    """Return why a session failed, in one line: a rank's first error, a signal in its log, or the exit code."""
    return f"{_cause(errors, log, code)}; see {log.parent.name}/{log.name}"


def _cause(errors: Path, log: Path, code: int) -> str:
    if code == STALLED:
        return f"no progress for {STALL_SECONDS / 60:.0f} minutes"
    reasons = sorted(errors.parent.glob(f"{errors.name}.rank*"), key=lambda path: path.stat().st_mtime_ns)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    killed = re.search(r"Signal \d+ \((SIG\w+)\)", text.partition("Root Cause")[2])
    name = killed[1] if killed else "SIGKILL" if re.search(r"^srun: error: .*: Killed$", text, re.MULTILINE) else ""
    # A killed rank leaves no error, and the others only report a closed connection, which torchrun may take for the
    # cause. SIGTERM comes from the launcher and SIGABRT from NCCL's watchdog, both after another rank has failed.
    texts = [path.read_text(encoding="utf-8") for path in reasons]
    if "Signal 9 (SIGKILL)" in text and texts and all(LOST_CONNECTION.search(reason) for reason in texts):
        name = "SIGKILL"
    if name and not (reasons and name in ("SIGTERM", "SIGABRT")):
        hint = ", often for lack of memory" if name == "SIGKILL" else ""
        return f"a rank was killed by {name}{hint}"
    if texts:
        return texts[0][:500]
    return f"exit code {code}"


@dataclass(frozen=True)
class LocalLaunch:
    """A ``Launch`` on this machine, under torchrun."""

    threads: int
    """Threads per rank, unless OMP_NUM_THREADS is set."""

    def __call__(self, file: Path, processes: int, log: Path, number: int) -> Process:
        """Start torchrun; if this process dies, so does torchrun, and it ends the ranks."""
        environment = {"OMP_NUM_THREADS": str(self.threads)} | os.environ
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return start([*launcher, "-m", WORKER, str(file)], environment, log)


@dataclass(frozen=True)
class SrunLaunch:
    """A ``Launch`` in a Slurm job whose tasks are the ranks."""

    def __call__(self, file: Path, processes: int, log: Path, number: int) -> Process:
        """Start srun; each start has a port of its own, since the one before may still be in use."""
        environment = os.environ | {"MASTER_PORT": str(job_port(int(os.environ["SLURM_JOB_ID"]), number))}
        python = shlex.split(os.environ.get("MOSA_PYTHON", "python"))
        more = shlex.split(os.environ.get("MOSA_SRUN_ARGUMENTS", ""))
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # since Slurm 22.05 srun does not take it from sbatch
            more.insert(0, f"--cpus-per-task={cpus}")
        command = ["srun", f"--ntasks={processes}", "--kill-on-bad-exit=1", *more, *python, "-m", WORKER, str(file)]
        return start(command, environment, log)


def main() -> None:
    """Run the session named on the command line in this Slurm job."""
    session = Session.read(Path(sys.argv[1]))
    if end := job_end():
        session = replace(session, deadline=end - _SECONDS_TO_END)
    supervise(session, SrunLaunch(), lambda event: say(str(event)))


if __name__ == "__main__":
    sys.exit(run_program(main))
