"""Training with compiled layers on the CPU, where ``choose_acceleration`` would not choose them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.zero import partition_parameters
from torch import distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_mosa.attention import mosa_layers
from megatron_mosa.config import Config
from megatron_mosa.engine import DeepSpeedEngine, deepspeed_engine, graphed
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

PATHS = {
    "plain": Acceleration(hindrance="on cpu"),
    "compiled": Acceleration(compiles_layers=True, hindrance="on cpu"),
    "graphs": Acceleration(compiles_layers=True, uses_graphs=True),
    "overlapped graphs": Acceleration(compiles_layers=True, uses_graphs=True, overlaps=True),
}


@contextlib.contextmanager
def engine_on(path: str, config: Config, layout: Layout) -> Iterator[DeepSpeedEngine]:
    """Yield an engine whose layers are traced as on a GPU, but on the plain kernels; the loss is interpreted.

    With "graphs" it takes the steps that they are captured of, and captures none.
    """
    compile_layers = MosaGPTModel.compile_layers

    def compile_plain(model: MosaGPTModel, kernels: KernelBackend, overlaps: bool) -> None:
        compile_layers(model, naive, kernels.linear_cross_entropy, "aot_eager", overlaps)

    with (
        mock.patch.object(deepspeed_engine, "choose_acceleration", lambda *_: PATHS[path]),
        mock.patch.object(MosaGPTModel, "compile_layers", compile_plain),
        mock.patch.object(torch.cuda, "Stream"),
        mock.patch.object(torch.cuda, "set_stream"),
    ):
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
    with mock.patch.object(graphed, "WARM_UPS", 1 << 30):
        yield engine
    engine.destroy()


def steps(config: Config, number: int, path: str) -> dict[str, Any]:
    """Everything that steps lead to, with evaluations and a state that is written and read between them.

    "tensors" are the gradients of every step and the final weights; "graphs" counts what was compiled after each step;
    "selected" is what the last step records of its first sequence.
    """
    facts: dict[str, Any] = {"losses": [], "norms": [], "tensors": [], "validation": [], "graphs": []}
    with parallel(config) as layout, engine_on(path, config, layout) as engine:
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
    with parallel(config) as layout, engine_on("compiled", config, layout) as engine:
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


def collectives(config: Config) -> tuple[dict[str, int], float]:
    """How often a step of "graphs" gathers each weight, and how often it reduces a gradient on average."""
    gathered, reduced = Counter[str](), 0
    with parallel(config) as layout, engine_on("graphs", config, layout) as engine:
        parameters = dict(engine.module.named_parameters())
        names = {parameter.ds_tensor.data_ptr(): name for name, parameter in parameters.items()}  # type: ignore
        gather, reduce = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

        def gather_counted(whole: torch.Tensor, shard: torch.Tensor, **options: Any) -> None:
            gathered[names[shard.data_ptr()]] += 1
            gather(whole, shard, **options)

        def reduce_counted(part: torch.Tensor, gradient: torch.Tensor, **options: Any) -> None:
            nonlocal reduced
            reduced += 1
            reduce(part, gradient, **options)

        engine.evaluate(micro_batches(config, layout, 99))  # leaves weights gathered
        with (
            mock.patch.object(dist, "all_gather_into_tensor", gather_counted),
            mock.patch.object(dist, "reduce_scatter_tensor", reduce_counted),
        ):
            engine.train_step(micro_batches(config, layout, 0), 1e-3)
    return dict(gathered), reduced / len(parameters)
