"""What runs survive on this machine: ``python -m benchmarks.faults --processes 4 [--device cpu|cuda] --out DIR``.

Starts small runs under torchrun, disturbs each with one fault, and resumes it at another layout. A row of the table
says how long the ranks took to end, with which exit code, whether stacks were written, which checkpoint was the newest,
and how far the losses of the resumed run deviate from those of an undisturbed one. Writes faults.md and faults.json
into DIR, with the logs and run directories beside them; exits with 1 if a row is not as docs/slurm.md says.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import psutil

from megatron_mosa.exit_codes import DONE, FAILED, HUNG, STOPPED
from megatron_mosa.metrics import read_journal
from megatron_mosa.resilience import read_status
from megatron_mosa.tools.scaling.memory import card
from megatron_mosa.utils import usable_processors, versions

ROOT = Path(__file__).parents[1]
STEPS, INTERVAL, FAULT_STEP = 30, 10, 16
SECONDS_TO_END = 30.0
"""From a fault to the end of the last rank; after a hang has been noticed, if it is one."""

SLOW_SECONDS = 15.0
"""By which the slow disk delays a checkpoint: longer than ``INTERVAL`` steps."""

START_SECONDS = 300.0
"""In which a start must end; a run that does not is killed, and its row fails."""

_COMMON = [
    f"train.steps={STEPS}", f"checkpoint.interval={INTERVAL}", "checkpoint.keep_last=9", "validation.interval=1000",
    "logging.interval=1", "logging.tensorboard=false", "optimizer.warmup_steps=5", "data.validation_fraction=0.2",
]  # fmt: skip
_SIZES = {
    # A step takes some 30 ms, most of it the start of operators and gloo.
    "cpu": [
        "model.num_layers=2", "model.hidden_size=32", "model.head_dim=8", "mosa.num_heads=6", "mosa.sparsity=8",
        "data.sequence_length=64", "data.vocab_size=400", "train.micro_batch_size=2", "train.global_batch_size=8",
    ],
    # So large that a step should take some 100 ms on four H100s.
    "cuda": [
        "model.num_layers=8", "model.hidden_size=512", "model.head_dim=64", "mosa.sparsity=16",
        "data.sequence_length=2048", "train.micro_batch_size=8", "train.global_batch_size=128",
        "train.precision=bf16",
    ],
}  # fmt: skip
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""Largest relative deviation of a loss after a change of layout: rounding in fp32, and in bf16."""

_HANG_TIMEOUT = {"cpu": 15.0, "cuda": 45.0}  # the first step compiles on a GPU
_LARGEST_FILE = 2**16  # bytes: less than a rank's part of a checkpoint, more than a log
_IS_WRITTEN = re.compile(r"\(training waited [\d.]+ s for the copy to memory, ([\d.]+) s for the disk\)")


@dataclass
class Row:
    """What a fault led to."""

    fault: str
    layouts: str
    """Where the run began and where it was resumed."""

    seconds: float | None = None
    """From the fault to the end of the last rank; None: the run goes on."""

    exit_code: int | None = None
    """Of the launcher."""

    documented: int = DONE
    stacks: int = 0
    """Ranks that wrote their stacks."""

    newest: int = 0
    """Step of the newest checkpoint after the end."""

    deviation: float | None = None
    """Largest relative deviation of a loss of the resumed run; None: it did not take all steps."""

    note: str = ""
    problems: list[str] = field(default_factory=list)
    """What is not as documented."""


class Start:
    """One start of a run: the launcher, its ranks and when the last of them ended."""

    def __init__(self, bench: Bench, name: str, layout: str, overrides: Sequence[str], slow: float = 0.0) -> None:
        self.directory = bench.folder / "runs" / name
        self.log = bench.folder / "logs" / f"{name}-{layout.replace(' ', '')}.log"
        program = ["-m", "benchmarks.slow_disk", str(slow)] if slow else [str(ROOT / "pretrain_mosa.py")]
        command = [sys.executable, "-W", "ignore", "-m", "megatron_mosa.cluster.torchrun", "--standalone"]
        command += ["--nproc-per-node", str(bench.processes), *program, *bench.config, *bench.layouts[layout]]
        with self.log.open("w", encoding="utf-8") as file:
            self.launcher = subprocess.Popen(
                [*command, f"run.name={name}", *overrides], cwd=ROOT, env=bench.environment, stdout=file, stderr=file
            )
        self._name, self._number = f"run.name={name}", bench.processes
        self._deadline = time.monotonic() + START_SECONDS
        self._ranks: dict[int, psutil.Process] = {}
        self.ended = 0.0
        """Unix time at which the last rank was found to have ended."""

        self.outliving = 0
        """Ranks that had not ended ``SECONDS_TO_END`` after the launcher."""

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, condition: Callable[[], object]) -> bool:
        """Wait for a condition; False if the launcher ended before."""
        while not condition():
            if not self._goes_on():
                return False
            time.sleep(0.02)
        return True

    def finish(self) -> int:
        """Wait for the end; return the launcher's exit code."""
        self.wait_until(lambda: False)
        outliving = psutil.wait_procs(list(self._ranks.values()), SECONDS_TO_END)[1]
        self.ended = self.ended or time.time()
        self.outliving = len(outliving)
        _kill(outliving)
        return self.launcher.wait()

    def _goes_on(self) -> bool:
        if time.monotonic() > self._deadline:
            self.launcher.kill()
            _kill(self._ranks.values())
            raise TimeoutError(f"did not end within {START_SECONDS:.0f} s; see {self.log.name}")
        if len(self._ranks) < self._number:
            with suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.launcher.pid).children()
                self._ranks |= {child.pid: child for child in children if self._name in child.cmdline()}
        if self._ranks and not self.ended and not any(map(_runs, self._ranks.values())):
            self.ended = time.time()
        return self.launcher.poll() is None

    def process_of(self, rank: int) -> int:
        """Return the process of a rank, which the launcher starts in their order."""
        return sorted(self._ranks.values(), key=lambda process: (process.create_time(), process.pid))[rank].pid


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Fault:
    """A way to disturb a run, and what must follow."""

    title: str
    documented: int
    injected: str = ""
    """A value of ``fault_injection.fault``, injected on rank 1."""

    ends: bool = True
    """The run ends because of it."""

    is_hang: bool = False
    newest: int = INTERVAL
    """Step of the newest checkpoint that must be left."""

    writes_stacks: bool = False
    """All ranks that can write their stacks do."""

    slow: float = 0.0
    """Seconds by which the disk delays each checkpoint."""

    act: Callable[[Start], float | None] | None = None
    """Disturbs the run from outside; returns the Unix time of the fault."""

    overrides: tuple[str, ...] = ()
    skips: bool = False
    """The undisturbed run to compare with skips the step."""


def _fill_disk(start: Start) -> None:
    """Let no file of rank 1 grow any more, after the first checkpoint."""
    checkpoint = start.directory / "checkpoints" / f"step-{INTERVAL:08d}"
    if start.wait_until(checkpoint.is_dir):
        with suppress(ProcessLookupError):  # the run was faster
            resource.prlimit(start.process_of(1), resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))


def _signal_twice(start: Start) -> float | None:
    """Ask rank 0 to stop, and once more while it writes its last checkpoint."""
    if not start.wait_until(lambda: f"step-{INTERVAL:08d} (training waited" in start.text):
        return None
    process = start.process_of(0)
    os.kill(process, signal.SIGTERM)
    if not start.wait_until(lambda: (read_status(start.directory) or {}).get("doing") == "writing the last checkpoint"):
        return None
    time.sleep(1.0)
    os.kill(process, signal.SIGTERM)
    return time.time()


FAULTS = {
    "kill": Fault("kill -9 of one rank", FAILED, "kill", writes_stacks=True),
    "stop": Fault("SIGSTOP of one rank", HUNG, "stop", is_hang=True, writes_stacks=True),
    "term": Fault("SIGTERM to one rank", STOPPED, "SIGTERM", newest=FAULT_STEP),
    "nan": Fault(
        "NaN in the loss of one rank", DONE, "nan", ends=False, newest=2 * INTERVAL, skips=True,
        overrides=(f"train.stop_after_step={2 * INTERVAL}",),
    ),
    "disk": Fault("a full disk at a save of one rank", FAILED, ends=False, act=_fill_disk),
    "twice": Fault(
        "a second SIGTERM while the first is handled", 128 + signal.SIGTERM, newest=2 * INTERVAL, slow=SLOW_SECONDS / 3,
        act=_signal_twice, writes_stacks=True,
    ),
    "slow": Fault(
        f"kill -9, with checkpoints that take {SLOW_SECONDS:.0f} s longer", FAILED, "kill", slow=SLOW_SECONDS,
        overrides=(f"fault_injection.step={FAULT_STEP + INTERVAL}",), writes_stacks=True,
    ),
}  # fmt: skip
"""By their names on the command line."""


@dataclass(frozen=True)
class Bench:
    """The runs of one call of this program."""

    folder: Path
    processes: int
    device: str
    at_once: int = 1
    """Rows measured at the same time, on the same devices."""

    @cached_property
    def layouts(self) -> dict[str, list[str]]:
        """The overrides of both layouts, by their names."""
        half = self.processes // 2
        return {
            f"TP 2 x DP {half}": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
            f"DP {self.processes}": ["parallel.tensor_model_parallel_size=1"],
        }

    @cached_property
    def config(self) -> list[str]:
        """The configuration and the overrides of all runs."""
        paths = [f"data.path={self.folder}/data", f"run.directory={self.folder}/runs"]
        return [str(ROOT / "configs" / "quickstart.yaml"), *_COMMON, *_SIZES[self.device], *paths]

    @cached_property
    def environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": str(max(1, usable_processors() // self.processes))}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return threads | os.environ | hidden | {"PYTHONPATH": path}

    def build_data(self) -> None:
        """Build a dataset of Python's standard library."""
        source = self.folder / "texts.jsonl"
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        command = [sys.executable, "-W", "ignore", "-m", "megatron_mosa", "data", "build", *self.config]
        subprocess.run([*command, f"data.sources=[{source}]"], check=True, env=self.environment, stdout=sys.stderr)

    def measure(self, names: Sequence[str]) -> list[Row]:
        """Return a row for each fault."""
        for name in ("runs", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if used := [path.name for path in (self.folder / "runs").iterdir()]:
            raise SystemExit(
                f"error: --out={self.folder} has runs of an earlier call ({used[0]}); give another directory"
            )
        self.build_data()
        with ThreadPoolExecutor(self.at_once) as threads:
            kinds = sorted({FAULTS[name].skips for name in names})
            expected = dict(zip(kinds, threads.map(self._undisturbed, kinds), strict=True))
            return list(threads.map(lambda name: self._row(name, expected[FAULTS[name].skips]), names))

    def _undisturbed(self, skips: bool) -> dict[int, float]:
        name = "undisturbed-skipping" if skips else "undisturbed"
        start = Start(self, name, next(iter(self.layouts)), [f"train.skip_steps=[{FAULT_STEP}]"] if skips else [])
        code = start.finish()
        if code != DONE:
            raise SystemExit(f"error: the undisturbed run ended with {code}; see {start.log}")
        return losses(start.directory)

    def _row(self, name: str, expected: dict[int, float]) -> Row:
        fault = FAULTS[name]
        first, second = self.layouts if list(FAULTS).index(name) % 2 == 0 else reversed(self.layouts)
        row = Row(fault.title, f"{first} -> {second}", documented=fault.documented)
        _say(f"{fault.title}, at {first}")
        try:
            self._disturb(row, name, first)
            _say(f"{fault.title}: resuming at {second}")
            again = Start(self, name, second, [])
            code = again.finish()
            found = losses(again.directory)
            if code == DONE and found.keys() == expected.keys():
                row.deviation = max(abs(found[step] / loss - 1) for step, loss in expected.items())
            if row.newest and f"step-{row.newest:08d}" not in again.text:
                row.problems.append(f"the resumed run did not begin at step {row.newest}")
            if row.deviation is None:
                row.problems.append(f"the resumed run ended with {code} after {len(found)} steps; see {again.log.name}")
            elif row.deviation > TOLERANCE[self.device]:
                row.problems.append(f"losses deviate by {row.deviation:.1e}")
        except (OSError, IndexError) as error:  # a run took too long, or ended too early
            row.problems.append(f"{type(error).__name__}: {error}")
        _say(line(row))
        return row

    def _disturb(self, row: Row, name: str, layout: str) -> None:
        """Start a run, disturb it, and record how it ended."""
        fault, hang = FAULTS[name], _HANG_TIMEOUT[self.device]
        overrides = [f"resilience.hang_timeout={hang}"] if fault.is_hang else []
        if not fault.slow:  # or a fault might come before the checkpoint is published
            overrides.append("checkpoint.asynchronous=false")
        if fault.injected:
            values = {"fault": fault.injected, "rank": 1, "step": FAULT_STEP}
            overrides += [f"fault_injection.{key}={value}" for key, value in values.items()]
        start = Start(self, name, layout, [*overrides, *fault.overrides], fault.slow)
        began = fault.act(start) if fault.act else None
        row.exit_code = start.finish()
        marker = start.directory / "fault_injected"
        began = marker.stat().st_mtime if marker.exists() else began
        if start.outliving:
            row.problems.append(f"{start.outliving} ranks outlived the launcher")
        if fault.ends and began is None:
            row.problems.append("the run ended before the fault")
        elif fault.ends and began is not None:
            row.seconds = start.ended - began
            limit = SECONDS_TO_END + (hang if fault.is_hang else 0)
            if row.seconds > limit:
                row.problems.append(f"ranks took longer than {limit:.0f} s to end")
        if row.exit_code != fault.documented:
            row.problems.append(f"exit code {row.exit_code} instead of {fault.documented}")
        row.stacks = len(list((start.directory / "stacks").glob("rank-*.txt")))
        if row.stacks != (self.processes - 1 if fault.writes_stacks else 0):
            row.problems.append(f"{row.stacks} ranks wrote their stacks")
        found = [int(path.name[5:]) for path in (start.directory / "checkpoints").glob("step-*")]
        row.newest = max(found, default=0)
        if row.newest != fault.newest:
            row.problems.append(f"the newest checkpoint is of step {row.newest} instead of {fault.newest}")
        if name == "disk" and "could not write the checkpoint" not in start.text:
            row.problems.append("the full disk was not reported")
        if name == "slow":
            waited = _IS_WRITTEN.search(start.text)
            lost = FAULT_STEP + INTERVAL - 1 - row.newest
            row.note = f"training waited {waited[1] if waited else 0} s for the disk; {lost} steps are repeated"
            if not waited or float(waited[1]) < 1:
                row.problems.append("the disk was not slow enough: the save was finished before the next was due")


def losses(directory: Path) -> dict[int, float]:
    """Return the training losses of a run, by step, without those of steps that were skipped."""
    found = read_journal(directory / "metrics.jsonl")
    return {entry["step"]: entry["loss"] for entry in found if entry.get("loss") is not None}


def line(row: Row) -> str:
    """Return a row for the terminal."""
    verdict = "holds" if not row.problems else f"DOES NOT HOLD: {'; '.join(row.problems)}"
    seconds = "the run goes on" if row.seconds is None else f"last rank ended after {row.seconds:.1f} s"
    return f"{row.fault}: {seconds}, exit code {row.exit_code}, newest checkpoint {row.newest}: {verdict}"


def markdown(rows: Sequence[Row], setting: str) -> str:
    """Return the table."""
    titles = ["fault", "begun at -> resumed at", "last rank ended after", "exit code (documented)", "stacks of"]
    titles += ["newest checkpoint", "losses of the resumed run deviate by", ""]
    lines = ["# Faults", "", setting, "", f"| {' | '.join(titles)} |", f"| {' | '.join(['---'] * len(titles))} |"]
    for row in rows:
        cells = [row.fault + (f" ({row.note})" if row.note else ""), row.layouts]
        cells += ["the run goes on" if row.seconds is None else f"{row.seconds:.1f} s"]
        cells += [
            f"{row.exit_code} ({row.documented})",
            f"{row.stacks} rank{'s' * (row.stacks > 1)}" if row.stacks else "",
        ]
        cells += [f"step {row.newest}" if row.newest else "none"]
        cells += ["" if row.deviation is None else f"{row.deviation:.1e}"]
        cells += ["holds" if not row.problems else f"**does not hold**: {'; '.join(row.problems)}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main() -> int:
    """Measure the faults, write the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="an even number; on GPUs one for each")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--at-once", type=int, help="rows measured at the same time; default: 3 on GPUs, 1 on a CPU")
    options = parser.parse_args()
    if options.processes < 2 or options.processes % 2:
        parser.error(f"--processes must be even and at least 2, got {options.processes}")
    names = [name for name in FAULTS if name in options.faults]
    at_once = options.at_once or (3 if options.device == "cuda" else 1)
    bench = Bench(options.out.absolute(), options.processes, options.device, at_once)
    begin = time.monotonic()
    rows = bench.measure(names)
    found = ", ".join(f"{name} {text}" for name, text in versions("torch", "megatron-core", "deepspeed").items())
    setting = f"{options.processes} x {_device(options.device)}, {found}; {time.monotonic() - begin:.0f} s in all."
    text = markdown(rows, setting)
    (bench.folder / "faults.md").write_text(text, encoding="utf-8")
    content = {"setting": setting, "rows": [asdict(row) for row in rows]}
    (bench.folder / "faults.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(text)
    return int(any(row.problems for row in rows))


def _device(device: str) -> str:
    if device == "cpu":
        return "CPU (gloo)"
    found = card()
    return f"{found.name if found else 'GPU'} (NCCL)"


if __name__ == "__main__":
    sys.exit(main())
