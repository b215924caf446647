"""Sessions of a sweep as Slurm jobs: submission, and waiting for what they write into the sweep's folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_mosa.errors import RunError, UserError
from megatron_mosa.sbatch import as_pattern
from megatron_mosa.tools.scaling.cells import Cell
from megatron_mosa.tools.scaling.session import Event, Session, Tail, Watch, is_measured, read_result, result_path
from megatron_mosa.utils import counted, say, write_atomically

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = Path("launch", "slurm", "sweep.sbatch")
_SESSION_GOES_HERE = "# -- mosa sweep puts the session here\n"
_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class SlurmRun:
    """Runs each session as a job; all at once, as far as the cluster lets them. A ``sweep.Run``.

    Jobs of an earlier call that are still queued or running are waited for instead of submitted again.
    """

    folder: Path
    """The sweep's; all nodes must see it under this path."""

    gpus_per_node: int
    """0: measure on CPUs, all ranks of a job on one node."""

    options: tuple[str, ...] = ()
    """Additional options of sbatch, such as ``--partition=gpu``."""

    def __call__(self, sessions: list[Session], watch: Watch) -> None:
        """Submit what no job of an earlier call measures, and wait for all jobs.

        Raises:
            RunError: sbatch refused a job, a job left cells unmeasured, or the wait was interrupted (jobs go on).
        """
        wanted = set().union(*map(_names, sessions))
        jobs = {job: session for job, session in self._earlier().items() if _names(session) & wanted}
        taken = {name for session in jobs.values() for name in _names(session)}
        for job, session in jobs.items():
            say(f"job {job}, of an earlier call: {_size(session)}")
        missing = []
        for session in sessions:
            cells = [tree for tree in session.cells if Cell.from_dict(tree).name not in taken]
            if cells:
                missing.append(self._unused_name(replace(session, cells=cells, deadline=None)))
        commands = [self.sbatch(session) for session in missing]  # all, before one is submitted
        try:
            for session, command in zip(missing, commands, strict=True):
                self._submit(session, command, jobs)
            self._wait(jobs, watch)
        except KeyboardInterrupt:
            if not jobs:
                raise
            raise RunError(
                f"stopped waiting; the jobs go on ({', '.join(jobs)}): run the same command again to collect their "
                f"results, or end them with scancel {' '.join(jobs)}"
            ) from None
        unfinished = [
            f"job {job} (logs/slurm-{job}.out)"
            for job, session in jobs.items()
            if any(read_result(self.folder, name) is None for name in _names(session) & wanted)
        ]
        if unfinished:
            raise RunError(
                f"{', '.join(unfinished)} ended before all its layouts were measured, perhaps at its time limit; run "
                "the same command again to measure what is missing"
            )

    def _earlier(self) -> dict[str, Session]:
        """Return the jobs of earlier calls that have not ended, with their sessions."""
        found = {}
        for path in self.folder.glob("jobs/*.job"):
            found[path.read_text(encoding="utf-8").strip()] = Session.read(path.with_suffix(".json"))
        running = running_jobs(list(found))
        return {job: session for job, session in found.items() if job in running}

    def _unused_name(self, session: Session) -> Session:
        """Return the session under a name that no earlier job has, since that job may still write its files."""
        number, name = 1, session.name
        while session.file.exists():
            number += 1
            session = replace(session, name=f"{name}-{number}")
        return session

    def sbatch(self, session: Session) -> list[str]:
        """Return the command that submits a session.

        The options are on the command line, not in #SBATCH lines, in which a path must not contain spaces.

        Raises:
            UserError: its processes do not divide among nodes.
        """
        per_node = min(session.processes, self.gpus_per_node or session.processes)
        if session.processes % per_node:
            raise UserError(
                f"{session.processes} processes do not divide among nodes of --gpus-per-node={self.gpus_per_node}; use "
                "a multiple of it"
            )
        return [
            "sbatch",
            "--parsable",
            f"--job-name=sweep-{session.name}",
            f"--nodes={session.processes // per_node}",
            f"--ntasks-per-node={per_node}",
            *([f"--gpus-per-node={per_node}"] if self.gpus_per_node else []),
            f"--chdir={Path.cwd()}",  # paths in the configuration may be relative
            f"--output={as_pattern(Path(session.folder, 'logs'))}/slurm-%j.out",
            *self.options,
            str(session.file.with_suffix(".sbatch")),
        ]

    def script(self, session: Session, command: Sequence[str]) -> str:
        """Return the batch script of a session; ``command`` submits it."""
        head, mark, rest = (ROOT / TEMPLATE).read_text(encoding="utf-8").partition(_SESSION_GOES_HERE)
        assert mark, f"{TEMPLATE} lacks the line {_SESSION_GOES_HERE!r}"
        lines = [f"# Submitted by: {shlex.join(command)}"]
        lines += [f"export MOSA_ROOT={shlex.quote(str(ROOT))}", f"set -- {shlex.quote(str(session.file))}"]
        return head + "\n".join(lines) + "\n" + rest

    def _submit(self, session: Session, command: list[str], jobs: dict[str, Session]) -> None:
        """Submit a session by its batch script, and add its job to ``jobs``."""
        session.write()
        for name in _names(session):  # their failures in earlier calls, or the job would count as having settled them
            if not is_measured(self.folder, name):
                result_path(self.folder, name).unlink(missing_ok=True)
        write_atomically(session.file.with_suffix(".sbatch"), self.script(session, command))
        done = call_slurm(*command)
        if done.returncode:
            session.file.unlink()
            others = f"; jobs submitted before go on: {', '.join(jobs)}" if jobs else ""
            raise RunError(f"sbatch refused the job: {' '.join(done.stderr.split())}{others}")
        job = done.stdout.strip().partition(";")[0]  # JOB, or JOB;CLUSTER
        write_atomically(session.file.with_suffix(".job"), f"{job}\n")
        jobs[job] = session
        say(f"job {job}: {_size(session)}")

    def _wait(self, jobs: dict[str, Session], watch: Watch) -> None:
        tails = {job: Tail(session.progress) for job, session in jobs.items()}
        failures = {job: _Failures(self.folder, _names(session)) for job, session in jobs.items()}
        running = set(jobs)
        while running:
            time.sleep(_POLL_SECONDS)
            ended = running - running_jobs(sorted(running))
            for job in sorted(running):  # once more after its end
                for event in (*tails[job].events(), *failures[job].events()):
                    watch(event)
            running -= ended


class _Failures:
    """Finds cells that have failed by their results: only the job itself hears of it otherwise."""

    def __init__(self, folder: Path, names: set[str]) -> None:
        self._folder = folder
        self._known = {name: self._failure(name) for name in names}  # those of earlier calls

    def events(self) -> list[Event]:
        """Return an event for each new failure."""
        found = {name: self._failure(name) for name in self._known}
        new = [name for name, time in found.items() if time is not None and time != self._known[name]]
        self._known |= {name: found[name] for name in new}
        return [Event(name, "failed") for name in sorted(new)]

    def _failure(self, name: str) -> float | None:
        """Return when a cell failed; None: it did not."""
        result = read_result(self._folder, name)
        return result["finished"] if result is not None and "reason" in result else None


def _size(session: Session) -> str:
    layouts, ranks = len(session.cells), session.processes
    return f"{counted(layouts, 'layout')} on {counted(ranks, 'rank')}"


def _names(session: Session) -> set[str]:
    return {Cell.from_dict(tree).name for tree in session.cells}


def running_jobs(jobs: Sequence[str]) -> set[str]:
    """Return those that are queued or running; all of them if Slurm does not answer."""
    if not jobs:
        return set()
    done = call_slurm("squeue", "-h", "-o", "%i", "-j", ",".join(jobs))
    if done.returncode and "Invalid job id" not in done.stderr:
        return set(jobs)
    return set(done.stdout.split()) & set(jobs)


def refuse_running_jobs(folder: Path) -> None:
    """Check before a sweep's results are removed that no job of it would write new ones afterwards.

    Raises:
        UserError: jobs are queued or running, or Slurm does not answer.
    """
    jobs = [path.read_text(encoding="utf-8").strip() for path in folder.glob("jobs/*.job")]
    if running := sorted(running_jobs(jobs)):
        raise UserError(
            f"--force would remove a sweep whose jobs have not ended: {', '.join(running)}; end them first with "
            f"scancel {' '.join(running)}"
        )


def check_partition(partition: str | None, gpus_per_node: int) -> None:
    """Check that a partition, or the default one, has nodes with that many GPUs; of several, all are checked.

    Raises:
        UserError: it has not, or does not exist.
        RunError: Slurm does not answer.
    """
    done = call_slurm("sinfo", "-h", "-o", "%P|%G")
    if done.returncode:
        raise RunError(f"sinfo failed: {' '.join(done.stderr.split())}; run this on a login node of the cluster")
    gpus: dict[str, int] = {}
    default = ""
    for line in done.stdout.splitlines():
        name, _, resources = line.partition("|")
        default = name.rstrip("*") if name.endswith("*") else default
        gpus[name.rstrip("*")] = max(gpus.get(name.rstrip("*"), 0), _gpus_in(resources))
    names = (partition or default).split(",")
    if names == [""]:
        raise UserError(f"this cluster has no default partition; give --partition, one of {', '.join(sorted(gpus))}")
    if unknown := [name for name in names if name not in gpus]:
        raise UserError(f"--partition={unknown[0]} does not exist; this cluster has {', '.join(sorted(gpus))}")
    name = min(names, key=lambda name: gpus[name])
    if gpus[name] >= gpus_per_node:
        return
    has = f"at most {counted(gpus[name], 'GPU')} per node" if gpus[name] else "no GPUs"
    fitting = [other for other, count in sorted(gpus.items()) if count >= gpus_per_node]
    fixes = ([f"--partition={' or '.join(fitting)}"] if fitting else []) + ["--gpus-per-node 0 to measure on CPUs"]
    raise UserError(f"partition {name} has {has}, but --gpus-per-node={gpus_per_node}; give {', or '.join(fixes)}")


def _gpus_in(resources: str) -> int:
    """Return the number of GPUs in Slurm's notation of generic resources, such as ``gpu:h100:4(S:0-1)``.

    A type may begin with a digit, as in ``gpu:3090:4``; what comes last is the count, if it is a number.
    """
    entries = [entry.split(":") for entry in re.sub(r"\([^()]*\)", "", resources).split(",")]
    return sum(int(parts[-1]) if parts[-1].isdecimal() else 1 for parts in entries if parts[0] == "gpu")


def call_slurm(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs to its end, with ``variables`` in addition to this process's environment.

    Raises:
        RunError: it is not installed.
    """
    environment = os.environ | variables
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
    except FileNotFoundError:
        raise RunError(f"{command[0]} is not on PATH; run this on a login node of a Slurm cluster") from None
