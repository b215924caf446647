"""Steps of ``GraphedSteps`` on the CPU, where no micro-batch is ever captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_mosa.config import Config
from megatron_mosa.engine import DeepSpeedEngine, deepspeed_engine, graphed
from megatron_mosa.engine.optimizer import adamw
from megatron_mosa.parallel import Layout
from tests.distributed.tasks import RATES, VOCAB_SIZE, micro_batches, parallel


def _fused(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """As it is on GPUs, where alone it skips steps by a tensor."""
    optimizer = adamw(model, config)
    for options in (optimizer.defaults, *optimizer.param_groups):
        options["fused"] = True
    return optimizer


@contextlib.contextmanager
def _engine(config: Config, layout: Layout, is_graphed: bool = True) -> Iterator[DeepSpeedEngine]:
    with mock.patch.object(deepspeed_engine, "adamw", _fused), mock.patch.object(graphed, "WARM_UPS", 1 << 30):
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        if is_graphed:
            clipping = config.optimizer.gradient_clipping
            engine._graphed = graphed.GraphedSteps(engine._engine.optimizer, engine._loss_in_graph, clipping)
        yield engine
        engine.destroy()


def steps(config: Config, number: int, is_graphed: bool) -> dict[str, list[float]]:
    """Losses and gradient norms, and of each parameter the norm of Adam's first moment, which clipping shows in."""
    with parallel(config) as layout, _engine(config, layout, is_graphed) as engine:
        results = [engine.train_step(micro_batches(config, layout, step), RATES[step % 2]) for step in range(number)]
        moments = [tensor.norm().item() for key, tensor in engine.state().items() if key.startswith("exp_avg.")]
    losses, norms = [result.loss for result in results], [result.grad_norm for result in results]
    return {"losses": losses, "norms": norms, "moments": moments}


def around_a_poisoned_step(config: Config) -> dict[str, Any]:
    """Of a step with a NaN on the last rank alone, after two that are sound."""
    with parallel(config) as layout, _engine(config, layout) as engine:
        for step in range(2):
            engine.train_step(micro_batches(config, layout, step), 1e-3)
        poisoned = micro_batches(config, layout, 2)
        if layout.data_parallel_rank == layout.data_parallel_size - 1:
            poisoned[0] = poisoned[0] | {"loss_mask": torch.full_like(poisoned[0]["loss_mask"], torch.nan)}
        before, count = _copied(engine), engine.optimizer_step()
        is_finite = engine.train_step(poisoned, 1e-3).is_finite
        after = _copied(engine)
        return {
            "is finite": is_finite,
            "is unchanged": all(torch.equal(before[key], after[key]) for key in before),
            "counted steps": engine.optimizer_step() - count,
            "then is finite": engine.train_step(micro_batches(config, layout, 3), 1e-3).is_finite,
        }


def _copied(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in engine.state().items()}
