"""Compiled layers, the chunked loss and graphs of micro-batches against the plain path, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megatron_mosa.engine.optimizer import adamw_step
from megatron_mosa.kernels import get_backend
from tests.distributed import tasks
from tests.distributed.pool import WorkerPools
from tests.gpu import acceleration_tasks
from tests.kernels.test_elementwise import check_accumulate, check_swiglu
from tests.kernels.test_loss import check_loss
from tests.kernels.test_rotary import SHAPES, check_split_heads
from tests.unit.test_optimizer import check_adamw_step

KINDS: dict[str, dict] = {
    "hybrid": {},
    "dense": {"mosa__num_heads": 0, "model__num_query_groups": 2},
    "pure": {"model__num_dense_heads": 0},
    "llama": {"model__activation": "swiglu", "model__normalization": "RMSNorm", "model__rotary_percent": 1.0},
    "threshold": {"mosa__selection": "threshold", "mosa__threshold_warmup_steps": 2, "mosa__load_feedback": 0.05},
    "tied": {"model__tie_embeddings": True},
    "local": {"model__num_local_heads": 2},
    "fixed": {"model__num_fixed_heads": 4, "model__fixed_stride": 5},
    "routing": {"model__num_routing_heads": 4, "model__routing_clusters": 3},
    "gated": {"model__attention_gate": True, "model__num_query_groups": 2, "model__num_local_heads": 2},
    "token_choice": {"mosa__selection": "token_choice"},
    "attention": {"train__recompute": "attention"},
    "in turn": {"parallel__tensor_parallel_overlap": "none", "model__activation": "swiglu"},
    "full": {"train__recompute": "full", "mosa__selection": "threshold", "mosa__threshold_warmup_steps": 2},
}

DOCUMENTS: dict = {  # in bf16 alone
    "model__attend_within_documents": True, "model__num_local_heads": 2, "model__num_fixed_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (64, 3, 2, 2, 64, 0.5), (129, 2, 4, 1, 128, 1.0)], ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_split_heads(documents: bool, shape: tuple, dtype: torch.dtype) -> None:
    check_split_heads(get_backend("triton", torch.empty(0, device="cuda")), shape, documents, dtype, "cuda")
    check_split_heads(get_backend("triton", torch.empty(0, device="cuda")), shape, documents, dtype, "cuda", stride=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [61, 8000, 32000])
def test_loss(vocabulary: int, dtype: torch.dtype) -> None:
    check_loss(get_backend("triton", torch.empty(0, device="cuda")), 5000, 64, vocabulary, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elementwise_kernels(dtype: torch.dtype) -> None:
    check_swiglu(50, 2300, dtype, "cuda")
    check_accumulate(70_001, dtype, "cuda")


def test_the_compiled_step_of_adamw() -> None:
    check_adamw_step(torch.compile(adamw_step, dynamic=False), "cuda")


def larger_config(**changes: object) -> tasks.Config:
    """Two micro-batches of a model whose heads are as wide as in practice."""
    settings = dict(
        model__hidden_size=128, model__head_dim=64, model__num_layers=3, train__global_batch_size=8,
        train__micro_batch_size=4, optimizer__weight_decay=0.1, optimizer__beta1=0.9, optimizer__beta2=0.95,
    )  # fmt: skip
    return tasks.tiny_config(**settings | changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_those_of_the_plain_path(workers: WorkerPools, kind: str, precision: str) -> None:
    # fp32: the two differ by rounding alone. bf16: the fast path is about as far from fp32 as the plain path is, but a
    # token more that rounding selects adds up to 0.15 to a router's error. A missing gradient has an error of 1.
    found = workers(1).run(acceleration_tasks.gradients, larger_config(**KINDS[kind]), precision)[0]
    assert found["chose"].startswith("acceleration: compiled layers")
    assert found["fast loss"] == pytest.approx(found["exact loss"], rel=1e-5 if precision == "fp32" else 5e-3)
    for name, (fast, plain) in found["errors"].items():
        assert fast < (1e-4 if precision == "fp32" else 2 * plain + 0.15), (name, fast, plain)


def check_alike(fast: dict[str, Any], plain: dict[str, Any], precision: str) -> None:
    """Six steps: losses, norms, a validation, and the direction in which each parameter moved.

    In bf16 the plain path's losses are up to 0.6 % from those in fp32, and cosines 0.6; a missing gradient gives 0.
    """
    close, of_norms, cosine = (1e-4, 1e-2, 0.9) if precision == "fp32" else (1.5e-2, 0.2, 0.4)
    assert fast["losses"] == pytest.approx(plain["losses"], rel=close)
    assert fast["norms"] == pytest.approx(plain["norms"], rel=of_norms)
    assert fast["validation"] == pytest.approx(plain["validation"], rel=close)
    for name, moved in plain["moved"].items():
        found = F.cosine_similarity(fast["moved"][name].flatten().double(), moved.flatten().double(), dim=0)
        assert found > cosine, (name, found.item())


@pytest.mark.parametrize("kind", [*KINDS, "documents"])
def test_steps_by_graphs_are_steps(workers: WorkerPools, kind: str) -> None:
    """Six steps in bf16 of both paths: losses, norms and validation; what the first selects is recorded in both."""
    config = larger_config(train__precision="bf16", **KINDS.get(kind, DOCUMENTS))
    fast = workers(1).run(acceleration_tasks.steps, config, 6)[0]
    config.train.acceleration = "none"
    plain = workers(1).run(acceleration_tasks.steps, config, 6)[0]
    assert fast["chose"].endswith("each micro-batch one CUDA graph") and plain["chose"].endswith("acceleration=none")
    check_alike(fast, plain, "bf16")
    assert fast["is graphed"] and not plain["is graphed"]
    for ours, theirs in zip(fast["selected"], plain["selected"], strict=True):
        assert (ours & theirs[:1]).sum() > 0.8 * theirs[:1].sum()  # of one sequence; bf16 changes some in deep layers
    assert (len(fast["thresholds"]) > 0) == (config.mosa.selection == "threshold")
    for ours, theirs in zip(fast["thresholds"], plain["thresholds"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("tensor_parallel", "sequence_parallel", "kind"),
    [
        (1, False, "hybrid"),
        (2, True, "llama"),
        (2, True, "threshold"),
        (2, False, "local"),
        (2, True, "attention"),
        (2, True, "in turn"),
        (2, False, "in turn"),
        (2, True, "fixed"),
        (2, True, "gated"),
        (2, True, "token_choice"),
    ],
)
def test_steps_on_two_cards(
    workers: WorkerPools, tensor_parallel: int, sequence_parallel: bool, kind: str, precision: str
) -> None:
    """Over NCCL, collectives inside the graphs; fp32 takes compiled layers alone."""
    config = larger_config(
        train__precision=precision, parallel__tensor_model_parallel_size=tensor_parallel,
        parallel__sequence_parallel=sequence_parallel, **KINDS[kind],
    )  # fmt: skip
    fast = workers(2).run(acceleration_tasks.steps, config, 6)
    config.train.acceleration = "none"
    plain = workers(2).run(acceleration_tasks.steps, config, 6)[0]
    assert all(facts["is graphed"] == (precision == "bf16") for facts in fast)
    overlaps = tensor_parallel == 2 and kind not in ("attention", "in turn")
    assert ("collectives beside computation" in fast[0]["chose"]) == overlaps
    for facts in fast:
        check_alike(facts, plain, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("cards", "zero_stage", "tensor_parallel", "kind"),
    [
        (1, 3, 1, "threshold"),
        (2, 3, 1, "hybrid"),
        (2, 3, 1, "tied"),
        (2, 3, 1, "attention"),
        (2, 3, 1, "full"),
        (2, 3, 2, "llama"),
        (2, 2, 1, "hybrid"),
        (2, 2, 2, "llama"),
        (2, 2, 1, "tied"),
    ],
)
def test_steps_whose_weights_or_gradients_are_partitioned(
    workers: WorkerPools, cards: int, zero_stage: int, tensor_parallel: int, kind: str, precision: str
) -> None:
    """Over NCCL, on a stream of its own; in bf16 as part of the graphs."""
    if cards > torch.cuda.device_count():
        pytest.skip("fewer than two GPUs")
    config = larger_config(
        train__precision=precision, parallel__zero_stage=zero_stage,
        parallel__tensor_model_parallel_size=tensor_parallel, parallel__sequence_parallel=True, **KINDS[kind],
    )  # fmt: skip
    fast = workers(cards).run(acceleration_tasks.steps, config, 6)[0]
    config.train.acceleration = "none"
    plain = workers(cards).run(acceleration_tasks.steps, config, 6)[0]
    assert fast["is graphed"] == (precision == "bf16")
    check_alike(fast, plain, precision)


def test_a_step_that_is_not_finite_changes_nothing(workers: WorkerPools) -> None:
    facts = workers(1).run(acceleration_tasks.around_a_step_that_is_not_finite, larger_config(train__precision="bf16"))[
        0
    ]
    assert facts["is graphed"] and not facts["bad is finite"] and not facts["empty is finite"]
    assert facts["unchanged"] and facts["steps"] == facts["steps after"] and facts["then finite"]


def test_another_batch_shape_and_back(workers: WorkerPools) -> None:
    losses = workers(1).run(acceleration_tasks.shapes, larger_config(train__precision="bf16"))[0]
    assert losses["fast"] == pytest.approx(losses["plain"], rel=5e-3)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model__attend_within_documents": True, "train__precision": "fp32"},
            "acceleration: none: model.attend_within_documents=true in fp32, which flash attention does not support",
        ),
        (
            {"parallel__zero_stage": 3, "parallel__offload_optimizer": True},
            "acceleration: compiled layers, no CUDA graphs: parallel.offload_optimizer=true",
        ),
        ({"train__precision": "fp32"}, "acceleration: compiled layers, no CUDA graphs: train.precision=fp32"),
        ({"mosa__backend": "naive"}, "acceleration: none: MoSA heads do not run on Triton's kernels"),
    ],
)
def test_what_falls_back_says_so(workers: WorkerPools, changes: dict, line: str) -> None:
    config = larger_config(**{"train__precision": "bf16"} | changes)
    assert workers(1).run(acceleration_tasks.choice, config)[0] == line
