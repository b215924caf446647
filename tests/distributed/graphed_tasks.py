"""Steps of ``GraphedSteps`` on the CPU, where no micro-batch is ever captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_mosa.attention import mosa_layers
from megatron_mosa.config import Config
from megatron_mosa.engine import DeepSpeedEngine, graphed
from megatron_mosa.engine.flat_buffers import WholeGradients
from megatron_mosa.kernels import get_backend, naive
from megatron_mosa.model import build_model, language_model_loss
from megatron_mosa.parallel import Layout
from tests.distributed.compiled_tasks import engine_on
from tests.distributed.tasks import RATES, VOCAB_SIZE, global_batch, micro_batches, parallel, recorded_gradients


def take_graphed_steps(engine: DeepSpeedEngine, clipping: float) -> None:
    """Let an engine that was built for the plain path under ZeRO-1 take the steps that graphs are captured of."""
    storage = WholeGradients(engine._engine.optimizer)
    engine._graphed = graphed.GraphedSteps(storage, engine._optimizer, engine._loss_in_graph, clipping)


@contextlib.contextmanager
def _engine(config: Config, layout: Layout, is_graphed: bool = True) -> Iterator[DeepSpeedEngine]:
    if config.parallel.zero_stage > 1:
        with engine_on("graphs" if is_graphed else "compiled", config, layout) as engine:
            yield engine
        return
    with mock.patch.object(graphed, "WARM_UPS", 1 << 30):
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        if is_graphed:
            take_graphed_steps(engine, config.optimizer.gradient_clipping)
        yield engine
        engine.destroy()


def steps(config: Config, number: int, is_graphed: bool) -> dict[str, list[float]]:
    """Losses and gradient norms, and of each parameter the norm of Adam's first moment, which clipping shows in."""
    with parallel(config) as layout, _engine(config, layout, is_graphed) as engine:
        results = [engine.train_step(micro_batches(config, layout, step), RATES[step % 2]) for step in range(number)]
        moments = [tensor.norm().item() for key, tensor in engine.state().items() if key.startswith("exp_avg.")]
    losses, norms = [result.loss for result in results], [result.grad_norm for result in results]
    return {"losses": losses, "norms": norms, "moments": moments}


def gradients(
    config: Config, path: str, number: int = 3, adds_in_place: bool = True
) -> tuple[list[dict[str, Tensor]], set[str]]:
    """Return the gradients of up to three steps, before clipping, and for which parameters autograd was given one.

    The first step takes all layers, the second leaves out the last layer in both micro-batches, the third in one.
    """
    found, returned = [], set()
    with parallel(config) as layout, engine_on(path, config, layout) as engine:
        if engine._graphed is not None and not adds_in_place:
            engine._graphed.storage.close()
            take_graphed_steps(engine, config.optimizer.gradient_clipping)
        for name, parameter in engine.module.named_parameters():
            parameter.register_hook(lambda gradient, name=name: returned.add(name) if gradient is not None else None)
        layer = engine.module.decoder.layers[-1]
        call, left_out = layer.forward, [False, False, True, True, True, False]

        def call_or_not(states: Tensor, *args: Any, **options: Any) -> Any:
            for totals in filter(None, [heads.gradient_totals for heads in mosa_layers(engine.module)]):
                assert all(total.untyped_storage().nbytes() == total.nbytes for total in totals)  # nothing to be copied
            if left_out.pop(0):
                return states if "compiled" in options else (states, None)
            return call(states, *args, **options)

        with mock.patch.object(layer, "forward", call_or_not):
            for step in range(number):
                with recorded_gradients(engine) as gradients:
                    engine.train_step(micro_batches(config, layout, step), 1e-3)
                found.append(gradients)
    return found, returned


def around_a_poisoned_step(config: Config) -> dict[str, Any]:
    """Report on a step with a NaN on the last rank only, after two good steps."""
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


def resumed(config: Config, stages: tuple[int, int], before: int, after: int) -> tuple[list[float], list[float]]:
    """Losses after ``before`` steps at the first stage: in the same engine, and in a new one at the second stage."""
    found: list[list[float]] = []
    state: dict[str, Tensor] = {}
    for stage in stages:
        config.parallel.zero_stage = stage
        with parallel(config) as layout, _engine(config, layout) as engine:
            if state:
                engine.load_state(state, before)
            else:
                for step in range(before):
                    engine.train_step(micro_batches(config, layout, step), 1e-3)
                state = _copied(engine)
            steps = range(before, before + after)
            found.append([engine.train_step(micro_batches(config, layout, step), 1e-3).loss for step in steps])
        config.run.seed += 1  # other initial weights, which the state must replace
    return found[0], found[1]


def _copied(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in engine.state().items()}


def fast_layers(config: Config, overlaps: bool = False) -> dict[str, float]:
    """Relative errors of loss and every gradient of the plainly written layers, traced, against Megatron's."""
    with parallel(config) as layout:
        batch = {name: tensor.to(layout.device) for name, tensor in global_batch(config, 0).items()}
        plain, fast = (build_model(config, VOCAB_SIZE).to(layout.device) for _ in range(2))
        # Traced as on a GPU, by dynamo and for autograd, but on the plain kernels; the loss is interpreted.
        loss = get_backend("triton", torch.empty(0)).linear_cross_entropy
        fast.compile_layers(naive, loss, "aot_eager", overlaps)
        found = []
        for model in (plain, fast):
            loss, count = language_model_loss(model, **batch)
            (loss / count).backward()
            found.append(
                {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            )
        assert found[0].keys() == found[1].keys()
        return {name: float((found[1][name] - value).norm() / value.norm()) for name, value in found[0].items()}
