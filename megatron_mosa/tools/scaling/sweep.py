"""``mosa sweep``: one run per layout, all from one seed checkpoint, on the same data in the same order.

This module starts the runs and stores their results; ``sweep_worker`` takes the steps, and ``sweep_report`` writes the
report. The layouts and the launcher are arguments: a planner can pass other layouts, and a cluster another ``Launch``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosa.config import Config, config_to_dict
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.tools.scaling.layouts import SweepLayout
from megatron_mosa.tools.scaling.sweep_report import NORM_TOLERANCE, TOLERANCE, Row, Sweep, write_report
from megatron_mosa.tools.scaling.sweep_worker import PACKAGES, Job
from megatron_mosa.utils import versions, write_atomically

REFERENCE = "reference"
_OWN = ("request.json", "results.csv", "results.md", "scaling.png", "jobs", "layouts", "logs", "seed")

Launch = Callable[[Path, int, Path], int]
"""(job file, processes, log file) -> exit code: runs ``sweep_worker JOB`` on that many ranks and waits."""


@dataclass(frozen=True)
class Request:
    """Settings of a sweep."""

    config: Config
    layouts: Sequence[SweepLayout]
    processes: int
    warmup: int
    steps: int
    output: Path
    command: str
    """The command line that repeats the sweep; for the report."""

    device: str
    """"cpu" or "cuda"."""

    def identity(self, dataset: dict[str, Any]) -> dict[str, Any]:
        """Return what all results in one directory must share; without the layouts, as more may be added."""
        config = config_to_dict(self.config)
        for key in ("checkpoint", "logging", "validation"):  # no step depends on them
            del config[key]
        config["run"] = {"seed": self.config.run.seed}
        config["train"].pop("micro_batch_size")
        config["train"].pop("stop_after_step")
        config["parallel"] = {
            key: value
            for key, value in config["parallel"].items()
            if key not in ("tensor_model_parallel_size", "sequence_parallel", "zero_stage")
        }
        numbers = {"processes": self.processes, "warmup": self.warmup, "steps": self.steps, "device": self.device}
        return {"request": numbers, **config, "dataset": dataset, "versions": versions(*PACKAGES)}


def run_sweep(request: Request, launch: Launch | None = None, force: bool = False) -> Sweep:
    """Run the layouts that have no result yet, write the report, and return it.

    Raises:
        UserError: a problem with the dataset, or an output directory that holds something else.
        RunError: the reference fails, or a layout's losses or gradient norms deviate from the reference's.
    """
    from megatron_mosa.train import check_start

    # The reference uses as few threads as the others: with one per core, a busy machine slows it down twenty-fold.
    launch = launch or LocalLaunch(max(1, (os.cpu_count() or 1) // request.processes))
    base = replace(request.config, run=replace(request.config.run, directory=str(request.output), name="sweep"))
    starts = [check_start(layout.apply(base), request.processes) for layout in request.layouts]
    prepare_output(request.output, request.identity(starts[0].data_identity), force)
    runs = _Runs(request, base, launch)
    reference = runs.reference()
    rows = [Row.of_reference(reference)]
    started, done = time.monotonic(), 0
    layouts = runs.with_earlier(request.layouts)
    missing = sum(runs.finished(layout) is None for layout in layouts)
    for number, layout in enumerate(layouts, start=1):
        kept = runs.finished(layout)
        result = kept or runs.run(layout)
        rows.append(Row.of_layout(layout, request.processes, result, reference))
        done += kept is None
        left = (time.monotonic() - started) / done * (missing - done) if done else 0.0
        print(f"[{number}/{len(layouts)}] {rows[-1].line}{' (kept)' if kept else ''}; {left:.0f} s left", flush=True)
    sweep = Sweep(request.config, rows, request.processes, request.command, request.device, versions(*PACKAGES))
    write_report(sweep, request.output)
    print(f"Wrote results.md, results.csv and scaling.png to {request.output}")
    _refuse_deviations(sweep, request.config.train.precision)
    return sweep


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
    for section, values in identity.items():
        for key, value in values.items():
            theirs = earlier.get(section, {}).get(key)
            if theirs != value:
                name = f"--{key}" if section == "request" else f"{section}.{key}"
                raise UserError(f"--output={folder} holds another sweep: {name}={theirs}, now {value}; {fix}")


class _Runs:
    """Starts the runs of one sweep and stores their results."""

    def __init__(self, request: Request, base: Config, launch: Launch) -> None:
        self.request = request
        self.base = base
        self.launch = launch
        self.folder = request.output

    def reference(self) -> dict[str, Any]:
        """Run one process at TP 1 in fp32, deterministically; it writes the seed checkpoint.

        Raises:
            RunError: it failed.
        """
        kept = self._read(REFERENCE)
        if kept is not None and (self.folder / "seed").is_dir():
            return kept
        shutil.rmtree(self.folder / "seed", ignore_errors=True)
        micro = min(layout.micro for layout in self.request.layouts)
        layout = SweepLayout(tp=1, sp=False, zero=0, micro=micro)
        if self.base.parallel.offload_optimizer:
            layout = replace(layout, zero=1)
        train = replace(self.base.train, precision="fp32", deterministic=True)
        print("reference: 1 process, fp32; writes the seed checkpoint", flush=True)
        result = self._start(REFERENCE, layout.apply(replace(self.base, train=train)), 1)
        if "reason" in result:
            raise RunError(
                f"the reference (1 process, {layout}, fp32) failed: {result['reason']}; without it there is no seed "
                f"checkpoint; see {self._log(REFERENCE)}"
            )
        return self._keep(REFERENCE, layout, result)

    def run(self, layout: SweepLayout) -> dict[str, Any]:
        """Run one layout; the result of a failure holds a ``reason``."""
        result = self._start(layout.name, layout.apply(self.base), self.request.processes)
        return self._keep(layout.name, layout, result)

    def finished(self, layout: SweepLayout) -> dict[str, Any] | None:
        """Return the result of a layout measured earlier, or None; layouts that failed are run again."""
        result = self._read(layout.name)
        return None if result is None or "reason" in result else result

    def with_earlier(self, layouts: Sequence[SweepLayout]) -> list[SweepLayout]:
        """Return the layouts measured by earlier calls, then the requested ones."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in (self.folder / "layouts").glob("tp*.json")]
        found.sort(key=lambda result: result["finished"])
        earlier = [SweepLayout(**result["layout"]) for result in found if "reason" not in result]
        return list(dict.fromkeys([*(layout for layout in earlier if layout not in layouts), *layouts]))

    def _start(self, name: str, config: Config, processes: int) -> dict[str, Any]:
        file, result = self.folder / "jobs" / f"{name}.json", self.folder / "jobs" / f"{name}.result"
        for path in self.folder.glob(f"jobs/{name}.*"):
            path.unlink()
        job = Job(
            config=config_to_dict(config),
            seed=str(self.folder / "seed"),
            writes_seed=name == REFERENCE,
            warmup=self.request.warmup,
            steps=self.request.steps,
            result=str(result),
            errors=str(self.folder / "jobs" / f"{name}.error"),
        )
        write_atomically(file, json.dumps(asdict(job), indent=1, allow_nan=False) + "\n")
        started = time.monotonic()
        code = self.launch(file, processes, self._log(name))
        wall = {"wall_seconds": time.monotonic() - started}
        if result.is_file():  # ranks may still fail while they exit; the measurement is complete
            return json.loads(result.read_text(encoding="utf-8")) | wall
        return {"reason": failure(Path(job.errors), self._log(name), code)} | wall

    def _keep(self, name: str, layout: SweepLayout, result: dict[str, Any]) -> dict[str, Any]:
        result = {"layout": asdict(layout), "finished": time.time(), **result}
        write_atomically(self.folder / "layouts" / f"{name}.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
        return result

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / "layouts" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


def failure(errors: Path, log: Path, code: int) -> str:
    """Return why a run failed, in one line: a rank's first error, a signal in the launcher's log, or the exit code."""
    reasons = sorted(errors.parent.glob(f"{errors.name}.rank*"), key=lambda path: path.stat().st_mtime_ns)
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    killed = re.search(r"Signal \d+ \((SIG\w+)\)", text.partition("Root Cause")[2])
    # A killed rank leaves no error, and the others only report a closed connection. SIGTERM comes from the launcher and
    # SIGABRT from NCCL's watchdog, both after another rank has failed.
    if killed and not (reasons and killed[1] in ("SIGTERM", "SIGABRT")):
        hint = ", often for lack of memory" if killed[1] == "SIGKILL" else ""
        return f"a rank was killed by {killed[1]}{hint}"
    if reasons:
        return reasons[0].read_text(encoding="utf-8")[:500]
    return f"exit code {code}; see {log.name}"


@dataclass(frozen=True)
class LocalLaunch:
    """A ``Launch`` on this machine, under torchrun."""

    threads: int
    """Threads per rank, unless OMP_NUM_THREADS is set."""

    def __call__(self, job: Path, processes: int, log: Path) -> int:
        """Run the job to its end; return the exit code of torchrun."""
        environment = {"OMP_NUM_THREADS": str(self.threads)} | os.environ
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*launcher, "-m", "megatron_mosa.tools.scaling.sweep_worker", str(job)]
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
        return done.returncode


def _refuse_deviations(sweep: Sweep, precision: str) -> None:
    for what, name, tolerance in (
        ("losses", "loss_deviation", TOLERANCE[precision]),
        ("gradient norms", "grad_norm_deviation", NORM_TOLERANCE[precision]),
    ):
        found = {row.label: getattr(row, name) for row in sweep.rows}
        wrong = [f"{label} ({value:.1e})" for label, value in found.items() if value is not None and value > tolerance]
        if wrong:
            raise RunError(
                f"{what} deviate from the reference by more than {tolerance:g} ({precision}): {', '.join(wrong)}"
            )
