"""What ``train.acceleration: auto`` comes to, as far as that can be told without a GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import triton

from megatron_mosa.engine import acceleration
from megatron_mosa.engine.acceleration import Acceleration, choose_acceleration
from megatron_mosa.engine.deepspeed_engine import load_compiler
from megatron_mosa.parallel import Layout
from tests.distributed.tasks import tiny_config


def test_runs_on_the_cpu_stay_as_they_are(layout: Layout) -> None:
    assert str(choose_acceleration(tiny_config(), layout)) == "acceleration: none: on cpu"


@pytest.mark.parametrize(
    ("changes", "hindrance"),
    [
        ({"train__acceleration": "none"}, "train.acceleration=none"),
        (
            {"model__attend_within_documents": True},
            "model.attend_within_documents=true in fp32, which flash attention does not support",
        ),
        ({"train__apex": "always"}, "train.apex=always asks for apex's norms"),
    ],
)
def test_what_hinders_is_named(layout: Layout, changes: dict, hindrance: str) -> None:
    on_gpu = replace(layout, device=torch.device("cuda"))
    assert choose_acceleration(tiny_config(**changes), on_gpu) == Acceleration(hindrance=hindrance)


def test_ranks_that_share_a_gpu_compile_nothing(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "get_backend", lambda *_: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # there is no GPU
    on_gpu = replace(layout, device=torch.device("cuda"))
    assert choose_acceleration(tiny_config(), on_gpu).hindrance.startswith("collectives over gloo")
    for backends in ("cuda:nccl", "cpu:gloo,cuda:nccl"):  # "nccl", and as other programs set up their groups
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda backends=backends: backends)
        assert choose_acceleration(tiny_config(), on_gpu).compiles_layers


@pytest.mark.parametrize(
    ("changes", "hindrance"),
    [
        ({}, ""),
        ({"train__micro_batch_size": 1}, "train.micro_batch_size=1 is odd"),
        ({"train__recompute": "attention"}, "train.recompute=attention"),
        ({"parallel__zero_stage": 3}, "parallel.zero_stage=3, which gathers the weights of a layer for one call"),
        ({"parallel__tensor_parallel_overlap": "none"}, None),
    ],
)
def test_collectives_run_beside_computation_if_that_is_asked_for(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, changes: dict, hindrance: str | None
) -> None:
    settings = dict(parallel__tensor_model_parallel_size=2, parallel__tensor_parallel_overlap="auto")
    monkeypatch.setattr(acceleration, "_against_compiled_layers", lambda config, layout: iter(()))
    found = choose_acceleration(tiny_config(**settings | changes), replace(layout, device=torch.device("cuda")))
    assert found.overlaps == (hindrance == "") and found.no_overlap == (hindrance or "")


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("changes", "hindrance"),
    [
        ({}, ""),
        ({"train__precision": "fp32"}, "train.precision=fp32"),
        ({"parallel__offload_optimizer": True}, "parallel.offload_optimizer=true"),
    ],
)
def test_micro_batches_are_graphs_wherever_weights_and_gradients_lie(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, zero_stage: int, changes: dict, hindrance: str
) -> None:
    monkeypatch.setattr(acceleration, "_against_compiled_layers", lambda config, layout: iter(()))
    config = tiny_config(**{"train__precision": "bf16", "parallel__zero_stage": zero_stage} | changes)
    found = choose_acceleration(config, layout)
    assert (found.uses_graphs, found.hindrance) == (not hindrance, hindrance)


def test_the_line_says_how_far_it_goes() -> None:
    assert str(Acceleration(True, True)) == "acceleration: compiled layers, each micro-batch one CUDA graph"
    some = Acceleration(compiles_layers=True, hindrance="train.precision=fp32")
    assert str(some) == "acceleration: compiled layers, no CUDA graphs: train.precision=fp32"
    assert str(Acceleration(True, True, overlaps=True)).endswith("one CUDA graph, collectives beside computation")
    line = str(Acceleration(True, True, no_overlap="train.recompute=full"))
    assert line.endswith("one CUDA graph, no overlap of collectives: train.recompute=full")


@pytest.mark.parametrize("chosen", [None, "/a/cache"])
def test_kernels_are_cached_in_one_place_from_the_first_start_on(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", chosen or "/removed/below")  # so that it is restored
    if chosen is None:
        monkeypatch.delenv("TRITON_CACHE_DIR")
    default = triton.knobs.cache.dir
    load_compiler()
    assert os.environ["TRITON_CACHE_DIR"] == (chosen or default)
