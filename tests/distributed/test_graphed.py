"""The steps that CUDA graphs are captured of, on the CPU: their gradients, reduction, clipping and skipping."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import graphed_tasks, tasks
from tests.distributed.pool import WorkerPools


def accumulating(ranks: int, tensor_parallel: int = 1, **changes: object) -> tasks.Config:
    return tasks.tiny_config(
        train__global_batch_size=8, train__micro_batch_size=4 * tensor_parallel // ranks, train__precision="bf16",
        model__tie_embeddings=True, parallel__tensor_model_parallel_size=tensor_parallel, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(("ranks", "tensor_parallel"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_losses_norms_and_moments_are_those_of_deepspeeds_steps(
    workers: WorkerPools, ranks: int, tensor_parallel: int
) -> None:
    # Documents on one rank: their shapes do not change with a batch.
    config = accumulating(ranks, tensor_parallel, model__attend_within_documents=ranks == 1)
    graphed, plain = (workers(ranks).run(graphed_tasks.steps, config, 5, is_graphed)[0] for is_graphed in (True, False))
    assert graphed["losses"] == pytest.approx(plain["losses"], rel=3e-3)
    assert graphed["norms"] == pytest.approx(plain["norms"], rel=3e-2)
    assert graphed["moments"] == pytest.approx(plain["moments"], rel=0.2)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"model__attend_within_documents": True}),
        (2, {"parallel__sequence_parallel": True, "train__recompute": "full"}),
    ],
)
def test_heads_add_their_gradients_to_the_totals_of_a_step(workers: WorkerPools, ranks: int, changes: dict) -> None:
    """Two micro-batches; bitwise what hooks add of the same graphs, also where a layer is left out."""
    config = accumulating(ranks, ranks, data__sequence_length=12, **changes)
    (ours, few), (hooks, every), (plain, _) = (
        workers(ranks).run(graphed_tasks.gradients, config, *of)[0]
        for of in (("graphs",), ("graphs", 3, False), ("plain", 1))
    )
    assert {name.rpartition(".")[2] for name in every - few} == {"qkv_weight", "proj_weight"} and every == plain[
        0
    ].keys()
    for step, (found, wanted) in enumerate(zip(ours, hooks, strict=True)):
        for name, gradient in wanted.items():
            assert torch.equal(found[name], gradient), (step, name)
    left_out = [name for name in ours[1] if name.startswith("decoder.layers.1.")]
    assert any("qkv_weight" in name for name in left_out)
    assert all(ours[0][name].any() and not ours[1][name].any() and ours[2][name].any() for name in left_out)
    for name, gradient in plain[0].items():
        assert torch.linalg.vector_norm(ours[0][name] - gradient) < 0.05 * torch.linalg.vector_norm(gradient), name


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_is_that_of_deepspeeds_steps_where_layers_are_reduced_one_by_one(workers: WorkerPools, stage: int) -> None:
    config = accumulating(2, parallel__zero_stage=stage)
    graphed, plain = (workers(2).run(graphed_tasks.steps, config, 5, is_graphed)[0] for is_graphed in (True, False))
    assert graphed["losses"] == pytest.approx(plain["losses"], rel=3e-3)
    assert graphed["norms"] == pytest.approx(plain["norms"], rel=3e-2)
    assert graphed["moments"] == pytest.approx(plain["moments"], rel=0.2)


@pytest.mark.parametrize("stages", [(3, 3), (3, 2)])
def test_a_new_engine_goes_on_from_the_state_of_another(workers: WorkerPools, stages: tuple[int, int]) -> None:
    straight, resumed = workers(2).run(graphed_tasks.resumed, accumulating(2), stages, 2, 2)[0]
    assert resumed == straight


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_non_finite_step_on_one_rank_is_skipped_on_all(workers: WorkerPools, stage: int) -> None:
    for facts in workers(2).run(graphed_tasks.around_a_poisoned_step, accumulating(2, parallel__zero_stage=stage)):
        assert facts == {"is finite": False, "is unchanged": True, "counted steps": 0, "then is finite": True}


@pytest.mark.parametrize(
    ("normalization", "sequence_parallel", "recompute", "overlaps"),
    [
        ("LayerNorm", True, "none", False),
        ("RMSNorm", False, "attention", False),
        ("RMSNorm", True, "full", False),
        ("LayerNorm", False, "none", True),
        ("RMSNorm", True, "none", True),
    ],
)
def test_the_plain_layers_and_the_split_loss_give_every_gradient_of_megatrons(
    workers: WorkerPools, normalization: str, sequence_parallel: bool, recompute: str, overlaps: bool
) -> None:
    config = tasks.tiny_config(
        parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=sequence_parallel,
        model__normalization=normalization, model__num_local_heads=2, model__activation="swiglu",
        train__recompute=recompute,
    )  # fmt: skip
    for errors in workers(2).run(graphed_tasks.fast_layers, config, overlaps):
        assert all(error < 1e-4 for error in errors.values()), errors
