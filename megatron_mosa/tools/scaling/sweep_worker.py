"""One rank of a session of a sweep: ``sweep_worker SESSION.json``, under torchrun or srun.

It measures the session's cells one after the other, each with groups and an engine of its own, and rank 0 writes each
result as soon as it is known.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
from torch import distributed as dist

from megatron_mosa.config import Config, config_from_dict
from megatron_mosa.data import training_batches
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.parallel import (
    Layout,
    destroy_parallel,
    initialize_parallel,
    join_store,
    launch_environment,
    use_deterministic_algorithms,
)
from megatron_mosa.tools.bench.measure import Batches, Profiling, measure
from megatron_mosa.tools.bench.measurement import Measurement
from megatron_mosa.tools.scaling.cells import Cell
from megatron_mosa.tools.scaling.session import (
    NO_MEMORY,
    NO_TIME,
    Event,
    Session,
    all_results,
    other_card,
    write_result,
)
from megatron_mosa.train import ResumePoint, check_start, learning_rate, training_samples
from megatron_mosa.utils import naming

PROFILING = Profiling(steps=2, warmup=0, on_cpu=True)
MAX_LEFT_BYTES = 2**29
"""GPU memory that a cell may leave allocated, such as workspaces of cuBLAS, before the processes are started again."""

_JOIN_SECONDS = 300.0
_COLLECTIVE_MINUTES = 5.0
_LONGEST_REASON = 250  # characters of an error's line


class Worker:
    """This rank, which keeps what all cells share."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config = config_from_dict(session.config)
        if session.deterministic:
            use_deterministic_algorithms()
        self.rank, self.world_size, local_rank = launch_environment()
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank % torch.cuda.device_count())  # or each rank would use memory of the first
            self._check_card()
        cells = [Cell.from_dict(tree) for tree in session.cells]
        self.start = None if session.random_tokens else check_start(cells[0].apply(self.config), self.world_size)
        self.store = join_store(_JOIN_SECONDS)
        self.cells = cells
        self.longest = 0.0
        self.phases: dict[str, float] = {}
        """Unix time at which each phase of the present cell began."""

    def run(self) -> None:
        """Measure the cells; end early before the deadline, or if memory stays allocated."""
        for number, cell in enumerate(self.cells):
            if not self._goes_on(number):
                break
            begin = time.time()
            self.phases = {} if number else {"starting processes": self.session.file.stat().st_mtime}
            self._tell(cell, "starting")
            _reset_peak_of_host()
            measurement = self._measure(cell, number)
            seconds = time.time() - begin
            self.longest = max(self.longest, seconds)
            if self.rank == 0:
                times = {"wall_seconds": seconds, "phase_seconds": self._phase_seconds()}
                write_result(self.session.folder, cell, {**asdict(measurement), **times})
            self._tell(cell, "done")
            self.store.set(f"left-{number}-{self.rank}", str(release_memory()))
        self.store.set(f"leaves-{self.rank}", "")
        if self.rank == 0:  # under srun it holds the store, and leaves last
            for rank in range(self.world_size):
                self.store.get(f"leaves-{rank}")

    def _measure(self, cell: Cell, number: int) -> Measurement:
        config, session = cell.apply(self.config), self.session
        layout = initialize_parallel(
            config.parallel.tensor_model_parallel_size,
            config.run.seed,
            timeout_minutes=_COLLECTIVE_MINUTES,
            store=dist.PrefixStore(f"cell-{number}", self.store),  # the groups before have left their keys
        )
        measurement = measure(
            config,
            layout,
            session.steps,
            session.warmup,
            vocab_size=self.start.manifest.vocab_size if self.start else None,
            batches=_batches(session, config, self.start, layout) if self.start else None,
            learning_rate=lambda step: learning_rate(step, config.train.steps, config.optimizer),
            profiling=PROFILING,
            times_loop=False,
            watch=lambda phase, step, of: self._tell(cell, phase, step, of),
            on_failure=lambda error: end_at_once(session, error),
        )
        deepspeed.comm.destroy_process_group()  # after the engine and its graphs; also drops what DeepSpeed caches
        destroy_parallel()
        for step, values in enumerate(zip(measurement.losses, measurement.grad_norms, strict=True), start=1):
            if not all(map(math.isfinite, values)):
                raise RunError(f"step {step}: loss {values[0]}, gradient norm {values[1]} are not finite")
        return measurement

    def _goes_on(self, number: int) -> bool:
        """Whether to begin a cell; rank 0 decides for all, and tells why not."""
        key = f"goes-on-{number}"
        if self.rank == 0:
            left = [
                int(self.store.get(f"left-{number - 1}-{rank}")) for rank in range(self.world_size if number else 0)
            ]
            deadline, obstacle = self.session.deadline, ""
            if max(left, default=0) > MAX_LEFT_BYTES:
                obstacle = NO_MEMORY
                print(f"{self.cells[number - 1]} has left {max(left) / 2**20:,.0f} MiB allocated on a GPU", flush=True)
            if deadline is not None and time.time() + self.longest > deadline:
                obstacle = NO_TIME
            if obstacle:
                self._tell(self.cells[number], obstacle)
            self.store.set(key, "no" if obstacle else "yes")
        return self.store.get(key) == b"yes"

    def _check_card(self) -> None:
        name = torch.cuda.get_device_name()
        for _, result in all_results(self.session.folder):
            theirs = result.get("device", name)
            if theirs != name:
                raise UserError(other_card(self.session.folder, theirs, name))

    def _phase_seconds(self) -> dict[str, float]:
        begins = [*self.phases.values(), time.time()]
        return {
            phase: end - begins[number] for number, (phase, end) in enumerate(zip(self.phases, begins[1:], strict=True))
        }

    def _tell(self, cell: Cell, phase: str, step: int = 0, of: int = 0) -> None:
        self.phases.setdefault(phase, time.time())
        if self.rank == 0:
            path = self.session.progress
            with naming(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(Event(cell.name, phase, step, of))) + "\n")


def _batches(session: Session, config: Config, start: ResumePoint, layout: Layout) -> Batches:
    """Return this rank's micro-batches of the run's own data, from the first sample."""
    samples = training_samples(config, start.data, start.index_samples)
    end = (session.warmup + session.steps + PROFILING.steps) * config.train.global_batch_size
    samples.prepare(0, end)
    found = training_batches(
        samples,
        consumed_samples=0,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=layout.data_parallel_rank,
        data_parallel_size=layout.data_parallel_size,
        num_workers=config.data.num_workers,
        end=end,
    )
    count = config.train.global_batch_size // (config.train.micro_batch_size * layout.data_parallel_size)
    return lambda step: list(islice(found, count))


def release_memory() -> int:
    """Free what the engine held; return the bytes that are still allocated on the GPU."""
    torch.compiler.reset()  # or the next cells' layers would exhaust the limit of recompilations
    for _ in range(2):  # the first pass runs finalizers, such as DeepSpeed's; the second frees what they have touched
        gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.set_stream(torch.cuda.default_stream())  # graphs have taken another
    torch._C._cuda_clearCublasWorkspaces()  # one for each stream, and they may lie in the memory of a graph
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _reset_peak_of_host() -> None:
    """Make the peak of this process's resident memory start anew, where Linux lets it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def reason_of(error: BaseException) -> str:
    """Return an error in one line: its type, the first useful line of its text, and the same of what caused it.

    An error of torch.compile often says only that compilation failed; its cause says why.
    """
    texts = [_in_one_line(error)]
    if error.__cause__ is not None:
        texts.append(_in_one_line(error.__cause__))
    return ", caused by ".join(texts)


def _in_one_line(error: BaseException) -> str:
    name = type(error).__name__
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    useful = [line for line in lines if line and not line.endswith(":")] or [line for line in lines if line]
    if useful:
        return f"{name}: {useful[0][:_LONGEST_REASON]}"
    frames = traceback.extract_tb(error.__traceback__)
    return f"{name} in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else name


def end_at_once(session: Session, error: BaseException) -> NoReturn:
    """Record why this rank failed and end the process: a normal exit would wait for ranks that wait for this one."""
    Path(f"{session.errors}.rank{os.environ.get('RANK', 0)}").write_text(reason_of(error), encoding="utf-8")
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def main() -> None:
    """Run the session in the file named on the command line."""
    session = Session.read(Path(sys.argv[1]))
    try:
        Worker(session).run()
    except BaseException as error:
        end_at_once(session, error)


if __name__ == "__main__":
    main()
