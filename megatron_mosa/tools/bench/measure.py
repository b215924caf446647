"""Times whole training steps of a configuration."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import distributed as dist

from megatron_mosa.config import Config
from megatron_mosa.data import lengths_of_documents
from megatron_mosa.engine import Batch, DeepSpeedEngine
from megatron_mosa.metrics import peak_flops, peak_memory_gib
from megatron_mosa.model import model_flops, parameter_count, usual_flops
from megatron_mosa.parallel import Layout
from megatron_mosa.tools.bench.loop import time_loop
from megatron_mosa.tools.bench.measurement import Measurement
from megatron_mosa.tools.bench.profile import profile_steps
from megatron_mosa.tools.bench.samples import random_batches
from megatron_mosa.utils import versions

POOL = 4  # steps' worth of batches, used in turn

Batches = Callable[[int], list[Batch]]
"""A step, counted from 0 -> this rank's micro-batches of it."""

Watch = Callable[[str, int, int], None]
"""Told what is about to happen: a phase, and which of how many steps of it (0 of 0 for a phase without steps)."""


@dataclass(frozen=True)
class Profiling:
    """Which steps ``measure`` profiles after the measured ones."""

    steps: int = 3
    warmup: int = 2
    on_cpu: bool = False
    """Also without a GPU, where only collectives are told apart."""


def measure(
    config: Config,
    layout: Layout,
    steps: int,
    warmup: int,
    *,
    vocab_size: int | None = None,
    batches: Batches | None = None,
    learning_rate: Callable[[int], float] | None = None,
    profiling: Profiling | None = None,
    times_loop: bool = True,
    watch: Watch = lambda phase, step, of: None,
    on_failure: Callable[[BaseException], None] = lambda error: None,
) -> Measurement:
    """Build the engine, take steps and destroy it, also if a step fails; a collective.

    A model with thresholds selects by them from the second step on, as it does after its own warm-up.

    Args:
        config: its dataset is not read.
        layout: of this process.
        steps: to time, 1 or more.
        warmup: steps before them; graphs need three, or the third micro-batch, and one more with thresholds.
        vocab_size: of the tokens; None: ``data.vocab_size``.
        batches: fetched before the clock starts; None: random tokens, which repeat after ``POOL`` steps.
        learning_rate: of a step, counted from 1; None: always ``optimizer.min_learning_rate``.
        profiling: of steps after these; None: on a GPU alone.
        times_loop: also take steps as a run does, for ``Measurement.loop``.
        watch: called with each phase, and in steps with the step's number and their number.
        on_failure: called with a step's error before the engine is destroyed, which may wait for other ranks.
    """
    is_gpu = layout.device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(layout.device)  # this process may have measured another configuration
    profiling = profiling or Profiling()
    vocab_size = vocab_size or config.data.vocab_size
    if config.mosa.selection == "threshold":
        config = replace(config, mosa=replace(config.mosa, threshold_warmup_steps=1))
    watch("building", 0, 0)
    begin = time.perf_counter()
    engine = DeepSpeedEngine(config, vocab_size, layout)
    built = time.perf_counter() - begin
    batches = batches or _pool(config, layout, engine.accumulation_steps)
    take = _Steps(engine, batches, learning_rate or (lambda step: config.optimizer.min_learning_rate), watch, is_gpu)
    try:
        name = "compiling and warming up" if engine.acceleration.compiles_layers else "warming up"
        first = [take(name, number, warmup) for number in range(1, warmup + 1)]
        times = [1000 * take("measuring", number, steps) for number in range(1, steps + 1)]
        allocated = _over_ranks(peak_memory_gib(layout.device), dist.ReduceOp.MAX, layout)
        reserved = _over_ranks(torch.cuda.max_memory_reserved() / 2**30 if is_gpu else 0.0, dist.ReduceOp.MAX, layout)
        kept = len(take.losses)
        profile = None
        if is_gpu or profiling.on_cpu:
            profile = profile_steps(lambda: take("profiling", 0, 0), profiling.steps, profiling.warmup, is_gpu)
        loop = asdict(time_loop(config, engine, layout, steps)) if times_loop else None
    except BaseException as error:
        on_failure(error)
        raise
    finally:
        # Graphs before groups: NCCL would wait forever for a communicator that a graph still refers to.
        engine.destroy()
    global_batch = config.train.global_batch_size
    executed = _over_ranks(model_flops(config, vocab_size, take.documents), dist.ReduceOp.SUM, layout)
    flops = {"executed": executed / layout.world_size, "usual": usual_flops(config, vocab_size)}
    share = None
    if profile is not None:
        share = _over_ranks(profile.communication_share, dist.ReduceOp.SUM, layout) / layout.world_size
    return Measurement(
        name=config.run.name,
        layout=describe(config, layout),
        device=_device_name(layout),
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
        losses=take.losses[:kept],
        profile=None if profile is None else asdict(profile),
        loop=loop,
        grad_norms=take.grad_norms[:kept],
        communication_share=share,
        model=_model(config),
    )


def difference(before: Measurement, config: Config, layout: Layout) -> str:
    """Say in what an earlier measurement is not of the step that ``measure`` would take; "" if it is.

    Acceleration, precision, recomputation and versions of libraries may differ: their times are worth comparing.
    """
    vocab_size = config.data.vocab_size
    pairs: dict[str, tuple[Any, Any]] = {
        "device": (before.device, _device_name(layout)),
        "layout": (before.layout, describe(config, layout)),
    }
    for section, ours in _model(config).items():
        theirs = (before.model or {}).get(section, {})
        pairs |= {f"{section}.{key}": (theirs[key], value) for key, value in ours.items() if key in theirs}
    pairs["parameters"] = (before.parameters, parameter_count(config, vocab_size))
    # With the model known, other FLOPs would only be counted in another way. Those within documents depend on tokens.
    if before.model is None and not config.model.attend_within_documents:
        flops = model_flops(config, vocab_size) * config.train.global_batch_size / layout.world_size
        pairs["FLOPs"] = (before.flops_per_step["executed"], flops)
    return "; ".join(f"{what}={theirs} (now {ours})" for what, (theirs, ours) in pairs.items() if theirs != ours)


def _device_name(layout: Layout) -> str:
    return torch.cuda.get_device_name() if layout.device.type == "cuda" else "cpu"


def _model(config: Config) -> dict[str, dict[str, Any]]:
    return {"model": asdict(config.model), "mosa": asdict(config.mosa)}


@dataclass
class _Steps:
    """Takes steps of an engine, one a call, and times them."""

    engine: DeepSpeedEngine
    batches: Batches
    learning_rate: Callable[[int], float]
    watch: Watch
    is_gpu: bool
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    documents: list[list[int]] = field(default_factory=list)
    """Lengths of the documents in each sequence, if attention stays within them."""

    def __call__(self, phase: str, number: int, of: int) -> float:
        """Return the seconds of a step, from the call until the device is done."""
        self.watch(phase, number, of)
        micro_batches = self.batches(len(self.losses))
        starts = [row for batch in micro_batches for row in batch.get("document_starts", ())]
        self.documents += map(lengths_of_documents, starts)
        rate = self.learning_rate(len(self.losses) + 1)
        wait = torch.cuda.synchronize if self.is_gpu else _nothing
        wait()
        start = time.perf_counter()
        result = self.engine.train_step(micro_batches, rate)
        wait()
        seconds = time.perf_counter() - start
        self.losses.append(result.loss)
        self.grad_norms.append(result.grad_norm)
        return seconds


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


def _pool(config: Config, layout: Layout, count: int) -> Batches:
    """Return random tokens of ``POOL`` steps, of ``count`` micro-batches each, in turn."""
    found = random_batches(config, layout)
    pool = [list(islice(found, count)) for _ in range(POOL)]
    return lambda step: pool[step % POOL]


def _over_ranks(number: float, operation: Any, layout: Layout) -> float:
    reduced = torch.tensor(number, dtype=torch.float64, device=layout.device)
    dist.all_reduce(reduced, operation)
    return reduced.item()


_nothing: Callable[[], None] = lambda: None  # noqa: E731
