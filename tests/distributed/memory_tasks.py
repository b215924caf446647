"""What is left of an engine in a process that goes on, as those of a sweep do."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from megatron_mosa.config import Config
from megatron_mosa.engine import DeepSpeedEngine, deepspeed_engine, graphed
from megatron_mosa.engine.acceleration import Acceleration
from megatron_mosa.kernels import KernelBackend, naive
from megatron_mosa.model.mosa_gpt import MosaGPTModel
from megatron_mosa.parallel import Layout
from megatron_mosa.tools.bench.measure import Profiling, measure
from megatron_mosa.tools.scaling.sweep_worker import release_memory
from tests.distributed.graphed_tasks import take_graphed_steps
from tests.distributed.tasks import VOCAB_SIZE, parallel


def left(config: Config, is_graphed: bool) -> tuple[list[str], int]:
    """Names of what is alive after a measurement, of the parameters, flat buffers and engines, and their number."""
    found: list[tuple[str, Any]] = []
    build, compile_layers = DeepSpeedEngine.__init__, MosaGPTModel.compile_layers

    def build_as_on_a_gpu(engine: DeepSpeedEngine, config: Config, vocab_size: int, layout: Layout) -> None:
        build(engine, config, vocab_size, layout)
        if engine._graphed is None and is_graphed:  # ZeRO-1
            take_graphed_steps(engine, clipping=0.5)
        found.extend((name, weakref.ref(thing)) for name, thing in _large(engine))

    def compile_plain(model: MosaGPTModel, kernels: KernelBackend, overlaps: bool) -> None:
        compile_layers(model, naive, kernels.linear_cross_entropy, "aot_eager", overlaps)

    overlaps = config.parallel.tensor_model_parallel_size > 1
    is_sharded = is_graphed and config.parallel.zero_stage > 1
    choice = Acceleration(True, is_sharded, hindrance="on cpu", overlaps=overlaps)
    with (
        parallel(config) as layout,
        mock.patch.object(deepspeed_engine, "choose_acceleration", lambda *_: choice),
        mock.patch.object(MosaGPTModel, "compile_layers", compile_plain),
        mock.patch.object(DeepSpeedEngine, "__init__", build_as_on_a_gpu),
        mock.patch.object(torch.cuda, "Stream"),
        mock.patch.object(torch.cuda, "set_stream"),
        mock.patch.object(graphed, "WARM_UPS", 1 << 30),
    ):
        measure(
            config, layout, steps=2, warmup=1, vocab_size=VOCAB_SIZE, profiling=Profiling(1, 0, on_cpu=True),
            times_loop=False,
        )  # fmt: skip
    release_memory()
    return [name for name, thing in found if thing() is not None], len(found)


def left_on_gpu(config: Config) -> tuple[str, list[int]]:
    """What a measurement ran, and the bytes that each of two leaves allocated."""
    left, chosen = [], ""
    with parallel(config) as layout:
        before = release_memory()
        for _ in range(2):
            chosen = measure(config, layout, steps=2, warmup=4, times_loop=False).acceleration
            left.append(release_memory() - before)
    return chosen, left


def _large(engine: DeepSpeedEngine) -> Iterator[tuple[str, Any]]:
    yield "engine", engine
    yield "DeepSpeed's engine", engine._engine
    yield from engine.module.named_parameters()
    for name, value in vars(engine._engine.optimizer).items():
        values = value if isinstance(value, list) else [value]
        yield from ((name, tensor) for tensor in values if isinstance(tensor, torch.Tensor))
