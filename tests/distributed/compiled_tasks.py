"""Training with compiled layers on the CPU, where ``choose_acceleration`` would not choose them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.zero import partition_parameters
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_mosa.attention import mosa_layers
from megatron_mosa.config import Config
from megatron_mosa.engine import DeepSpeedEngine, deepspeed_engine
from megatron_mosa.engine.acceleration import Acceleration
from megatron_mosa.kernels import KernelBackend, naive
from megatron_mosa.metrics import recorded_selection
from megatron_mosa.model.mosa_gpt import MosaGPTModel
from megatron_mosa.parallel import Layout
from tests.distributed.tasks import (
    RATES,
    VOCAB_SIZE,
    master_weights,
    micro_batches,
    parallel,
    recorded_gradients,
    whole,
)


@contextlib.contextmanager
def _engine(config: Config, layout: Layout, is_compiled: bool, backend: str = "aot_eager") -> Iterator[DeepSpeedEngine]:
    """Yield an engine whose layers are traced as on a GPU, but on the plain kernels; the loss is interpreted."""
    compile_layers = MosaGPTModel.compile_layers

    def compile_plain(model: MosaGPTModel, kernels: KernelBackend, overlaps: bool) -> None:
        compile_layers(model, naive, kernels.linear_cross_entropy, backend, overlaps)

    choice = Acceleration(compiles_layers=is_compiled, hindrance="on cpu")
    with (
        mock.patch.object(deepspeed_engine, "choose_acceleration", lambda *_: choice),
        mock.patch.object(MosaGPTModel, "compile_layers", compile_plain),
    ):
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
    yield engine
    engine.destroy()


def steps(config: Config, number: int, is_compiled: bool) -> dict[str, Any]:
    """Everything that steps lead to, with evaluations and a state that is written and read between them.

    "tensors" are the gradients of every step and the final weights; "graphs" counts what was compiled after each step;
    "selected" is what the last step records of its first sequence.
    """
    facts: dict[str, Any] = {"losses": [], "norms": [], "tensors": [], "validation": [], "graphs": []}
    with parallel(config) as layout, _engine(config, layout, is_compiled) as engine:
        torch._dynamo.utils.counters.clear()
        for step in range(number):
            recorded = recorded_selection(engine.module) if step == number - 1 else contextlib.nullcontext()
            with recorded, recorded_gradients(engine) as gradients:
                result = engine.train_step(micro_batches(config, layout, step), RATES[step % 2])
            facts["losses"].append(result.loss)
            facts["norms"].append(result.grad_norm)
            facts["tensors"].append(gradients)
            facts["graphs"].append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            facts["validation"].append(engine.evaluate(micro_batches(config, layout, 99)))
            if step == 0:
                engine.load_state({key: tensor.clone() for key, tensor in engine.state().items()}, 1)
        facts["tensors"].append(whole(engine.module, master_weights(engine)))
        found = [heads.selection for heads in mosa_layers(engine.module)]
        facts["selected"] = [None if selection is None else selection[1][0].tolist() for selection in found]
    return facts


def gathered(config: Config) -> dict[str, Any]:
    """How often each weight is gathered in a micro-batch, whose memory is kept after it was released, and more."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with parallel(config) as layout, _engine(config, layout, True) as engine:
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        free_param, released, kept = partition_parameters.free_param, Counter[str](), list[str]()
        storages: list[tuple[str, StorageWeakRef]] = []

        def free(parameter: torch.nn.Parameter) -> None:
            released[names[id(parameter)]] += 1
            storages.append((names[id(parameter)], StorageWeakRef(parameter.data.untyped_storage())))
            free_param(parameter)

        backward = engine._engine.backward

        def look_and_go_backward(loss: torch.Tensor) -> None:
            kept.extend(name for name, storage in storages if not storage.expired())
            backward(loss)

        engine.train_step(micro_batches(config, layout, 0), 1e-3)  # DeepSpeed records the order of modules
        engine.evaluate(micro_batches(config, layout, 99))  # and this does not change it
        engine.train_step(micro_batches(config, layout, 1), 1e-3)  # begins with what evaluation left gathered
        with (
            mock.patch.object(partition_parameters, "free_param", free),
            mock.patch.object(engine._engine, "backward", look_and_go_backward),
        ):
            engine.train_step(micro_batches(config, layout, 2), 1e-3)
        linear = torch.nn.functional.linear
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"released": released, "kept": kept, "graphs": graphs, "linear is torch's": linear is torch._C._nn.linear}
