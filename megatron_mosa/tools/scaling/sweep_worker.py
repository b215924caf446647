"""One rank of one layout of a sweep, started by ``sweep.py`` under torchrun: ``sweep_worker JOB.json``.

It takes and measures the steps of a job, and rank 0 writes the result next to it. The reference's job writes the seed
checkpoint from which all other jobs start.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_mosa.checkpoint import CheckpointStore, Metadata
from megatron_mosa.config import Config, config_from_dict, config_to_dict
from megatron_mosa.data import training_batches
from megatron_mosa.engine import Batch, DeepSpeedEngine, StepResult
from megatron_mosa.errors import RunError
from megatron_mosa.metrics import peak_memory_gib
from megatron_mosa.parallel import (
    Layout,
    destroy_parallel,
    initialize_parallel,
    launch_environment,
    use_deterministic_algorithms,
)
from megatron_mosa.train import ResumePoint, check_start, learning_rate, training_samples
from megatron_mosa.utils import versions, write_atomically

PACKAGES = ("torch", "megatron-core", "deepspeed")  # that, with this project, determine a result
PROFILED_STEPS = 2


@dataclass(frozen=True)
class Job:
    """The work of one launch of this module; plain JSON on disk."""

    config: dict[str, Any]
    """The resolved configuration with the layout to measure."""

    seed: str
    """Directory of the seed checkpoint."""

    writes_seed: bool
    """Whether this job writes the seed checkpoint; all others read it."""

    warmup: int
    """Steps before the measured ones."""

    steps: int
    """Measured steps."""

    result: str
    """JSON file that rank 0 writes at the end; it exists only if the job succeeded."""

    errors: str
    """Prefix of the files in which ranks record why they failed."""


@dataclass
class Measurement:
    """The result of a job."""

    tokens_per_step: int
    """Tokens over all ranks."""

    losses: list[float]
    """Loss of every step, warm-up included."""

    grad_norms: list[float]
    """Gradient norm of every step, before clipping."""

    step_seconds: list[float]
    """Durations of the measured steps on rank 0."""

    peak_memory_gib: float
    """Maximum over ranks."""

    communication_share: float
    """Mean over ranks; see ``communication_seconds``."""

    device: str
    """Name of rank 0's device."""


def measure(job: Job) -> None:
    """Take the steps of a job; rank 0 writes the result. A collective."""
    config = config_from_dict(job.config)
    if config.train.deterministic:
        use_deterministic_algorithms()
    _, world_size, _ = launch_environment()
    start = check_start(config, world_size)
    layout = initialize_parallel(config.parallel.tensor_model_parallel_size, config.run.seed)
    engine = DeepSpeedEngine(config, start.manifest.vocab_size, layout)
    _share_seed(job, config, start, engine, layout)
    measurement = _steps(job, config, engine, layout, _batches(job, config, start, layout))
    if layout.is_main:
        write_atomically(Path(job.result), json.dumps(asdict(measurement), indent=1, allow_nan=False) + "\n")
    engine.destroy()
    destroy_parallel()


def _share_seed(job: Job, config: Config, start: ResumePoint, engine: DeepSpeedEngine, layout: Layout) -> None:
    """Write the seed checkpoint (a complete one, at step 0), or load it."""
    store = CheckpointStore(Path(job.seed), keep_last=1)
    if not job.writes_seed:
        seed = store.newest().path
        if seed is None:
            raise RunError(f"the seed checkpoint in '{job.seed}' is missing; run the sweep again with --force")
        store.load(engine, seed)
        return
    metadata = Metadata(
        step=0,
        consumed_samples=0,
        optimizer_step=0,
        config=config_to_dict(config),
        data=start.data_identity,
        versions=versions(*PACKAGES),
        layout={
            "tensor_parallel_size": layout.tensor_parallel_size,
            "data_parallel_size": layout.data_parallel_size,
        },
    )
    store.save(engine, metadata)


def _batches(job: Job, config: Config, start: ResumePoint, layout: Layout) -> Iterator[Batch]:
    """Return this rank's micro-batches of the run's own data, from the first sample."""
    samples = training_samples(config, start.data, start.index_samples)
    samples.prepare(0, (job.warmup + job.steps + PROFILED_STEPS) * config.train.global_batch_size)
    return training_batches(
        samples,
        consumed_samples=0,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=layout.data_parallel_rank,
        data_parallel_size=layout.data_parallel_size,
        num_workers=config.data.num_workers,
    )


def _steps(job: Job, config: Config, engine: DeepSpeedEngine, layout: Layout, batches: Iterator[Batch]) -> Measurement:
    """Take the warm-up, measured and profiled steps."""
    device = layout.device
    results: list[StepResult] = []

    def step() -> float:
        rate = learning_rate(len(results) + 1, config.train.steps, config.optimizer)
        started = time.perf_counter()
        result = engine.train_step(islice(batches, engine.accumulation_steps), rate)
        _synchronize(device)
        seconds = time.perf_counter() - started
        results.append(result)
        if not result.is_finite:
            raise RunError(f"step {len(results)}: loss {result.loss}, gradient norm {result.grad_norm} are not finite")
        return seconds

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the whole seed was on the device for a moment
    seconds = [step() for _ in range(job.warmup + job.steps)][job.warmup :]
    memory = peak_memory_gib(device)  # before the profiler uses any
    kept = list(results)
    # Every rank profiles, so that none waits for one that the profiler slows down.
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        wall = sum(step() for _ in range(PROFILED_STEPS))
    share = communication_seconds(_intervals(profiler)) / wall
    return Measurement(
        tokens_per_step=config.train.global_batch_size * config.data.sequence_length,
        losses=[result.loss for result in kept],
        grad_norms=[result.grad_norm for result in kept],
        step_seconds=seconds,
        peak_memory_gib=_over_ranks(memory, dist.ReduceOp.MAX, layout),
        communication_share=_over_ranks(share, dist.ReduceOp.SUM, layout) / layout.world_size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    )


def _intervals(profiler: profile) -> list[tuple[str, float, float]]:
    """Return name, begin and end (seconds) of every profiled event."""
    return [(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in profiler.events() or ()]


def communication_seconds(intervals: list[tuple[str, float, float]]) -> float:
    """Return how long at least one collective was running on this rank.

    Gloo's operations appear as ``gloo:NAME`` on its own threads, NCCL's as kernels on the GPU. Both last from the
    moment this rank joins until all ranks have joined, so they include waiting for a slower rank. Overlapping
    operations count once.
    """
    spans = sorted((begin, end) for name, begin, end in intervals if _communicates(name))
    total, until = 0.0, float("-inf")
    for begin, end in spans:
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _communicates(name: str) -> bool:
    return name.startswith(("gloo:", "ncclDevKernel", "ncclKernel"))


def _over_ranks(value: float, operation: Any, layout: Layout) -> float:
    tensor = torch.tensor(value, dtype=torch.float64, device=layout.device)
    dist.all_reduce(tensor, op=operation)
    return tensor.item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Run the job in the file named on the command line; on failure, record the reason and exit with 1."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    try:
        measure(job)
    except BaseException as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        Path(f"{job.errors}.rank{os.environ.get('RANK', 0)}").write_text(reason, encoding="utf-8")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # a normal exit would wait for ranks that wait for this one


if __name__ == "__main__":
    main()
