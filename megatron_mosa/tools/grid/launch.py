"""Where the cells of a grid run: in processes of this machine, or as Slurm jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_mosa.errors import RunError
from megatron_mosa.exit_codes import FAILED
from megatron_mosa.resilience import read_status
from megatron_mosa.sbatch import as_pattern
from megatron_mosa.tools.processes import Process, start
from megatron_mosa.tools.scaling.sweep_slurm import ROOT, call_slurm, running_jobs
from megatron_mosa.utils import say, usable_processors, write_atomically

_SECONDS_TO_SAVE = 300.0  # that a run has for its last checkpoint
_QUEUE_SECONDS = 2.0  # between two looks at Slurm's queue
_SCRIPT = Path("launch", "slurm", "pretrain.sbatch")


class Handle(Protocol):
    """A cell that runs."""

    def poll(self) -> int | None:
        """Return the exit code of its run, or None while it runs."""
        ...


class Launcher(Protocol):
    """Starts cells."""

    device: str
    """What they run on, for the results."""

    processes: int
    """Ranks of a cell."""

    @property
    def is_alone(self) -> bool:
        """Whether a cell has its devices for itself."""
        ...

    def start(self, name: str, config: Path, run: Path, log: Path) -> Handle:
        """Start a cell by the file of its configuration; its output is appended to the log.

        Args:
            run: its run directory.

        Raises:
            RunError: it could not be started.
        """
        ...

    def stop(self, handles: Sequence[Handle]) -> None:
        """Have cells save and end, and wait for that.

        Raises:
            RunError: they go on without this process.
        """
        ...


@dataclass(frozen=True)
class _Process:
    process: Process
    slot: str
    run: Path
    started: float
    saves: bool
    """Whether it trains, and so saves when it is asked to stop."""

    def poll(self) -> int | None:
        code = self.process.poll()
        status = read_status(self.run) or {}
        if code and status.get("started", 0.0) > self.started:  # torchrun's own code is always 1
            return status.get("exit_code", code)
        return code


@dataclass
class LocalLauncher:
    """Starts cells on this machine."""

    device: str
    processes: int
    """Ranks of a cell."""

    jobs: int
    """Cells at once."""

    gpus: Sequence[str]
    """Identifiers for CUDA_VISIBLE_DEVICES; empty: cells run on the CPU."""

    _running: list[_Process] = field(default_factory=list)

    @property
    def slots(self) -> list[str]:
        """Values of CUDA_VISIBLE_DEVICES, one for each cell that can have its devices for itself."""
        size = self.processes
        groups = [self.gpus[start : start + size] for start in range(0, len(self.gpus) - size + 1, size)]
        return [",".join(group) for group in groups] or [""]

    @property
    def is_alone(self) -> bool:
        return self.jobs <= len(self.slots)

    def start(self, name: str, config: Path, run: Path, log: Path) -> Handle:
        return self.launch(["pretrain", str(config)], run, log)

    def launch(self, arguments: Sequence[str], run: Path, log: Path, ranks: int | None = None) -> Handle:
        """Start a program of ``mosa`` where the fewest run; its output is appended to the log.

        Args:
            run: the run directory that it writes or reads.
            ranks: None: those of a cell.
        """
        self._running = [one for one in self._running if one.process.poll() is None]
        slot = min(self.slots, key=lambda slot: sum(one.slot == slot for one in self._running))
        begin = time.time()
        command, environment = self.command(arguments, slot, self.jobs, ranks)
        process = start(command, environment, log, append=True)
        started = _Process(process, slot, run, begin, arguments[0] == "pretrain")
        self._running.append(started)
        return started

    def command(
        self, arguments: Sequence[str], visible: str, jobs: int, ranks: int | None = None
    ) -> tuple[list[str], dict[str, str]]:
        """Return the command of all ranks of a program of ``mosa``, and its environment.

        Args:
            visible: a slot.
            jobs: how many such programs share the processors.
            ranks: None: those of a cell.
        """
        ranks = ranks or self.processes
        threads = max(1, usable_processors() // (jobs * self.processes))
        # Of a launcher of this command, srun included: a program of one rank would take itself for one of several.
        left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")
        environment = {"OMP_NUM_THREADS": str(threads)} | {k: v for k, v in os.environ.items() if k not in left_out}
        if visible:
            environment["CUDA_VISIBLE_DEVICES"] = visible
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        start = [sys.executable, *(launcher if ranks > 1 else []), "-m", "megatron_mosa"]
        return [*start, *arguments], environment

    def stop(self, handles: Sequence[Handle]) -> None:
        # Not SIGTERM, which a scheduler may also send: a run that gets the same signal twice ends without saving.
        number = signal.SIGUSR1 if self.processes == 1 else signal.SIGTERM  # which torchrun passes on
        for one in self._running:
            one.process.send_signal(number if one.saves else signal.SIGTERM)
        latest = time.monotonic() + _SECONDS_TO_SAVE
        for one in self._running:
            try:
                one.process.wait(max(1.0, latest - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()


@dataclass(frozen=True)
class _Job:
    number: str
    run: Path
    launcher: SlurmLauncher

    def poll(self) -> int | None:
        if self.number in self.launcher.in_queue():
            return None
        status = read_status(self.run) or {}
        return status.get("exit_code", FAILED)


@dataclass
class SlurmLauncher:
    """Submits each cell as a job of its own, which restarts until its run is done (docs/slurm.md).

    A job of an earlier call that is still queued or running is waited for instead of submitted again.
    """

    folder: Path
    """The grid's; all nodes must see it under this path."""

    processes: int
    gpus_per_node: int
    """0: cells run on CPUs."""

    options: Sequence[str]
    """Additional options of sbatch."""

    device: str = "Slurm"
    _jobs: list[str] = field(default_factory=list)
    _queue: set[str] = field(default_factory=set)
    _looked_at: float = 0.0

    @property
    def is_alone(self) -> bool:
        return self.gpus_per_node > 0  # a job's GPUs are its own, but not the CPUs' caches and memory

    def in_queue(self) -> set[str]:
        """Return the jobs of this call that are queued or running, as of a short time ago."""
        if time.monotonic() - self._looked_at > _QUEUE_SECONDS:
            self._queue, self._looked_at = running_jobs(self._jobs), time.monotonic()
        return self._queue

    def start(self, name: str, config: Path, run: Path, log: Path) -> Handle:
        file = self.folder / "jobs" / f"{name}.job"
        number = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        if number and running_jobs([number]):
            say(f"job {number}, of an earlier call: {name}")
        else:
            number = self._submit(name, config, log)
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, f"{number}\n")
            say(f"job {number}: {name}")
        self._jobs.append(number)
        self._queue.add(number)
        return _Job(number, run, self)

    def _submit(self, name: str, config: Path, log: Path) -> str:
        options = [
            f"--job-name={name}",
            "--nodes=1",
            f"--ntasks-per-node={self.processes}",
            *([f"--gpus-per-node={self.processes}"] if self.gpus_per_node else []),
            f"--chdir={Path.cwd()}",  # paths in the configuration may be relative
            f"--output={as_pattern(log.absolute())}",
            "--export=ALL",
            *self.options,
        ]
        # In the environment, since --export would end a path at a comma.
        variables = {"MOSA_ROOT": str(ROOT), "MOSA_TASKS_PER_NODE": f"{self.processes}"}
        done = call_slurm("sbatch", "--parsable", *options, str(ROOT / _SCRIPT), str(config), **variables)
        if done.returncode:
            others = f"; jobs submitted before go on: {', '.join(self._jobs)}" if self._jobs else ""
            raise RunError(f"sbatch refused the job: {' '.join(done.stderr.split())}{others}")
        return done.stdout.strip().partition(";")[0]  # JOB, or JOB;CLUSTER

    def stop(self, handles: Sequence[Handle]) -> None:
        left = sorted(running_jobs(self._jobs))
        if handles and left:
            raise RunError(
                f"stopped waiting; the jobs go on ({', '.join(left)}): run the same command again to collect their "
                f"results, or end them with scancel {' '.join(left)}"
            )
