"""Compiled layers under ZeRO-2 and 3 against the plain path, on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import compiled_tasks, tasks
from tests.distributed.pool import WorkerPools

KINDS: dict[str, dict] = {
    "hybrid": {},
    "dense": {"mosa__num_heads": 0, "model__tie_embeddings": True, "train__recompute": "full"},
    "threshold": {"mosa__selection": "threshold", "mosa__threshold_warmup_steps": 1, "train__recompute": "attention"},
    "tensor parallel": {"model__normalization": "RMSNorm", "model__num_local_heads": 2, "model__activation": "swiglu"},
    "routing": {
        "mosa__num_heads": 0,
        "model__num_routing_heads": 4,
        "model__routing_clusters": 3,
        "model__routing_decay": 0.8,
        "train__recompute": "attention",
    },
}


@pytest.mark.parametrize(
    ("ranks", "stage", "kind", "path"),
    [
        (2, 3, "hybrid", "compiled"),
        (2, 3, "dense", "compiled"),
        (2, 3, "threshold", "compiled"),
        (4, 3, "tensor parallel", "compiled"),
        (2, 2, "hybrid", "compiled"),
        (4, 3, "routing", "compiled"),
        (2, 3, "hybrid", "graphs"),
        (2, 3, "dense", "graphs"),
        (4, 3, "tensor parallel", "graphs"),
        (2, 3, "routing", "graphs"),
        (2, 2, "threshold", "graphs"),
        (4, 2, "tensor parallel", "overlapped graphs"),
    ],
)
def test_losses_gradients_and_weights_are_those_of_the_plain_path(
    workers: WorkerPools, ranks: int, stage: int, kind: str, path: str
) -> None:
    """Two micro-batches a step; evaluation, and a state that is written and read, between the steps."""
    config = tasks.tiny_config(
        train__global_batch_size=8, train__micro_batch_size=2, parallel__zero_stage=stage,
        parallel__tensor_model_parallel_size=ranks // 2, parallel__sequence_parallel=True, **KINDS[kind],
    )  # fmt: skip
    plain, fast = (workers(ranks).run(compiled_tasks.steps, config, 3, of)[0] for of in ("plain", path))
    for numbers in ("losses", "norms", "validation"):
        assert fast[numbers] == pytest.approx(plain[numbers], rel=1e-5)
    for ours, theirs in zip(fast["tensors"], plain["tensors"], strict=True):
        for name, tensor in theirs.items():
            assert torch.linalg.vector_norm(ours[name] - tensor) < 1e-4 * torch.linalg.vector_norm(tensor), name
    assert 0 < fast["graphs"][1] == fast["graphs"][2]  # weights that come and go do not make layers compile again
    assert not any(plain["graphs"])
    assert fast["selected"] == plain["selected"] and None not in plain["selected"]


def test_weights_are_gathered_once_for_forward_and_once_for_backward(workers: WorkerPools) -> None:
    config = tasks.tiny_config(
        train__global_batch_size=4, train__micro_batch_size=2, parallel__zero_stage=3, model__num_layers=4
    )
    found = workers(2).run(compiled_tasks.gathered, config)[0]
    assert found["graphs"] == 1 and found["linear is torch's"]  # so that all layers share what is compiled
    assert not found["kept"]  # by what compiled layers keep for backward
    for name, times in found["released"].items():
        is_kept = not name.startswith(("decoder.layers.0.", "decoder.layers.1.")) or "norm" in name
        assert times == (1 if is_kept else 2), name


@pytest.mark.parametrize(("stage", "is_tied"), [(2, False), (3, False), (3, True)])
def test_graphs_gather_weights_as_often_as_their_stage_says(workers: WorkerPools, stage: int, is_tied: bool) -> None:
    """Two micro-batches a step: twice in each under ZeRO-3, but for what backward begins with; once under ZeRO-2."""
    config = tasks.tiny_config(
        train__global_batch_size=8, train__micro_batch_size=2, parallel__zero_stage=stage, model__num_layers=4,
        model__tie_embeddings=is_tied,
    )  # fmt: skip
    gathered, reductions = workers(2).run(compiled_tasks.collectives, config)[0]
    assert reductions == 2  # of every gradient
    assert len(gathered) > 20
    for name, times in gathered.items():
        is_gathered_again = name.startswith(("decoder.layers.0.", "decoder.layers.1.")) and "norm" not in name
        assert times == (1 if stage == 2 else 4 if is_gathered_again else 2), name
