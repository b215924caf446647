"""Times whole training steps of a configuration, on random tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import distributed as dist

from megatron_mosa.config import Config
from megatron_mosa.engine import DeepSpeedEngine
from megatron_mosa.metrics import peak_flops
from megatron_mosa.model import model_flops, parameter_count, usual_flops
from megatron_mosa.parallel import Layout
from megatron_mosa.tools.bench.loop import time_loop
from megatron_mosa.tools.bench.profile import profile_steps
from megatron_mosa.tools.bench.samples import random_batches
from megatron_mosa.utils import versions

POOL = 4  # steps' worth of batches, used in turn


@dataclass
class Measurement:
    """The result of ``mosa bench``, written as JSON."""

    name: str
    """``run.name``."""

    layout: str
    device: str
    versions: dict[str, str]
    acceleration: str
    """What ``train.acceleration`` chose."""

    milliseconds: list[float]
    """Of each measured step, from the call to when the device is done."""

    tokens_per_step: int
    """Of all ranks."""

    flops_per_step: dict[str, float]
    """Of one rank: "executed" is what ``model_flops`` counts, "usual" what ``usual_flops`` counts."""

    peak_flops: float
    parameters: int
    """Of the whole model."""

    allocated_gib: float
    reserved_gib: float
    seconds_to_build: float
    seconds_of_first_steps: list[float]
    losses: list[float]
    """Of the first steps."""

    profile: dict[str, Any] | None = field(default=None)
    """``StepProfile`` on a GPU."""

    loop: dict[str, float] | None = field(default=None)
    """``LoopTime``: what a run adds to its steps."""

    @property
    def median(self) -> float:
        """Median step time in milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks."""
        return 1000 * self.tokens_per_step / self.median

    def mfu(self, rule: str = "executed") -> float:
        """Model FLOP/s over the peak, by a rule of ``flops_per_step``."""
        return 1000 * self.flops_per_step[rule] / self.median / self.peak_flops


def measure(config: Config, layout: Layout, steps: int, warmup: int) -> Measurement:
    """Build the engine and take steps; a collective.

    Args:
        config: its dataset is not read; the vocabulary has ``data.vocab_size`` tokens.
        layout: of this process.
        steps: to time, 1 or more.
        warmup: steps before them, 1 or more; graphs need three, or the third micro-batch.
    """
    begin = time.perf_counter()
    engine = DeepSpeedEngine(config, config.data.vocab_size, layout)
    built = time.perf_counter() - begin
    batches = random_batches(config, layout)
    pool = [list(islice(batches, engine.accumulation_steps)) for _ in range(POOL)]
    wait = torch.cuda.synchronize if layout.device.type == "cuda" else _nothing
    losses: list[float] = []

    def step() -> float:
        batches = pool[len(losses) % POOL]
        wait()
        start = time.perf_counter()
        losses.append(engine.train_step(batches, config.optimizer.min_learning_rate).loss)
        wait()
        return time.perf_counter() - start

    first = [step() for _ in range(warmup)]
    times = [1000 * step() for _ in range(steps)]
    is_gpu = layout.device.type == "cuda"
    allocated, reserved = (f() / 2**30 if is_gpu else 0.0 for f in (_max_allocated, _max_reserved))
    profile = asdict(profile_steps(step)) if is_gpu else None
    loop = asdict(time_loop(config, engine, layout, steps))
    global_batch, vocab_size = config.train.global_batch_size, config.data.vocab_size
    flops = {"executed": model_flops(config, vocab_size), "usual": usual_flops(config, vocab_size)}
    engine.destroy()
    return Measurement(
        name=config.run.name,
        layout=describe(config, layout),
        device=torch.cuda.get_device_name() if is_gpu else "cpu",
        versions=versions("torch", "triton", "megatron-core", "deepspeed"),
        acceleration=str(engine.acceleration),
        milliseconds=times,
        tokens_per_step=global_batch * config.data.sequence_length,
        flops_per_step={rule: count * global_batch / layout.world_size for rule, count in flops.items()},
        peak_flops=peak_flops(layout.device, config.train.precision, config.logging.peak_tflops)[0],
        parameters=parameter_count(config, vocab_size),
        allocated_gib=allocated,
        reserved_gib=reserved,
        seconds_to_build=built,
        seconds_of_first_steps=first,
        losses=losses[:warmup],
        profile=profile,
        loop=loop,
    )


def describe(config: Config, layout: Layout) -> str:
    """Name a layout, such as ``TP 2 SP x DP 2, ZeRO 1, 4 micro-batches of 4 x 4096``."""
    train = config.train
    tensor = f"TP {layout.tensor_parallel_size}"
    if config.parallel.sequence_parallel and layout.tensor_parallel_size > 1:
        tensor += " SP"
    count = train.global_batch_size // (train.micro_batch_size * layout.data_parallel_size)
    return (
        f"{tensor} x DP {layout.data_parallel_size}, ZeRO {config.parallel.zero_stage}, {count} micro-batch"
        f"{'es' * (count > 1)} of {train.micro_batch_size} x {config.data.sequence_length}"
    )


def _max_allocated() -> int:
    return _over_ranks(torch.cuda.max_memory_allocated())


def _max_reserved() -> int:
    return _over_ranks(torch.cuda.max_memory_reserved())


def _over_ranks(number: int) -> int:
    """Return the largest of all ranks' numbers."""
    largest = torch.tensor(number, device="cuda")
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


_nothing: Callable[[], None] = lambda: None  # noqa: E731
