"""One model, whatever the layout: TP 1, 2, 4, with and without sequence parallelism, under the DeepSpeed engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import tasks
from tests.distributed.pool import WorkerPools

Cell = tuple[int, int, bool, int]  # ZeRO stage, tensor parallel size, sequence parallel, world size
LAYOUTS: list[Cell] = [  # by tensor-parallel size, since another one makes new groups
    (zero, *layout)
    for layout in ((1, False, 2), (2, False, 2), (2, True, 2), (4, False, 4), (4, True, 4), (2, True, 4))
    for zero in (0, 1, 2, 3)
]


@pytest.fixture(scope="module")
def seed_checkpoint(workers: WorkerPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's state before the first step, of weights that no configuration below would draw."""
    path = tmp_path_factory.mktemp("seed")
    workers(1).run(tasks.write_seed_checkpoint, tasks.tiny_config(run__seed=77), path)
    return path


@pytest.fixture(scope="module")
def single(workers: WorkerPools, seed_checkpoint: Path) -> dict:
    """The facts of one process."""
    facts = workers(1).run(tasks.training_facts, tasks.tiny_config(parallel__zero_stage=0), seed_checkpoint)[0]
    # fp32 rounding moves scores by about 1e-7: no near-tie decides what follows.
    assert facts["margin"] > 1e-5
    return facts


def run(workers: WorkerPools, checkpoint: Path, layout: Cell, break_norms: bool = False, **changes: object) -> dict:
    zero, tensor_parallel, sequence_parallel, world = layout
    config = tasks.tiny_config(
        parallel__zero_stage=zero,
        parallel__tensor_model_parallel_size=tensor_parallel,
        parallel__sequence_parallel=sequence_parallel,
        train__micro_batch_size=4 * tensor_parallel // world,
        **changes,
    )
    return workers(world).run(tasks.training_facts, config, checkpoint, break_norms=break_norms)[0]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_does_not_depend_on_the_layout(
    workers: WorkerPools,
    seed_checkpoint: Path,
    single: dict,
    layout: Cell,
) -> None:
    facts = run(workers, seed_checkpoint, layout)
    check_equal(facts, single)


FEWER_LAYOUTS: list[Cell] = [
    (zero, *layout) for layout in ((1, False, 2), (2, True, 4), (4, True, 4)) for zero in (0, 1, 2, 3)
]


@pytest.mark.parametrize("recompute", ["attention", "full"])
@pytest.mark.parametrize("layout", FEWER_LAYOUTS, ids=str)
def test_recompute_changes_nothing(
    workers: WorkerPools,
    seed_checkpoint: Path,
    single: dict,
    layout: Cell,
    recompute: str,
) -> None:
    facts = run(workers, seed_checkpoint, layout, train__recompute=recompute)
    check_equal(facts, single)


@pytest.mark.parametrize("layout", [cell for cell in FEWER_LAYOUTS if cell[0] > 0], ids=str)
def test_offload_changes_nothing(
    workers: WorkerPools,
    seed_checkpoint: Path,
    single: dict,
    layout: Cell,
) -> None:
    offload = {"parallel__offload_optimizer": True}
    facts = run(workers, seed_checkpoint, layout, **offload)
    check_equal(facts, single)


@pytest.fixture(scope="module")
def single_dense(workers: WorkerPools, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A seed checkpoint of a model without MoSA heads, and the facts of one process in fp32."""
    path = tmp_path_factory.mktemp("dense")
    workers(1).run(tasks.write_seed_checkpoint, tasks.tiny_config(run__seed=77, mosa__num_heads=0), path)
    config = tasks.tiny_config(parallel__zero_stage=0, mosa__num_heads=0)
    return path, workers(1).run(tasks.training_facts, config, path)[0]


# Where rounding to bf16 moves a selection, a MoSA head's gradients are other ones: of this model all is compared,
# of the hybrid below what does not depend on one selection.
@pytest.mark.parametrize("layout", [cell for cell in LAYOUTS if cell[0] > 0], ids=str)
def test_bf16_follows_fp32_in_every_layout(
    workers: WorkerPools,
    single_dense: tuple[Path, dict],
    layout: Cell,
) -> None:
    checkpoint, single = single_dense
    options = {"train__precision": "bf16", "mosa__num_heads": 0}
    facts = run(workers, checkpoint, layout, **options)
    for name, gradient in single["gradients"].items():
        assert relative_error(facts["gradients"][name].float(), gradient) < 0.03, name
        if gradient.dim() > 1:
            assert relative_error(facts["final"][name], single["final"][name]) < 0.01, name
    for key in ("losses", "validation"):
        assert facts[key] == pytest.approx(single[key], rel=1e-3)
    assert facts["norms"] == pytest.approx(single["norms"], rel=2e-2)


@pytest.mark.parametrize("layout", [cell for cell in FEWER_LAYOUTS if cell[0] > 0], ids=str)
def test_a_hybrid_in_bf16_follows_fp32(workers: WorkerPools, seed_checkpoint: Path, single: dict, layout: Cell) -> None:
    facts = run(workers, seed_checkpoint, layout, train__precision="bf16")
    for name, weight in single["final"].items():
        if weight.dim() > 1:
            assert relative_error(facts["final"][name], weight) < 0.1, name
    for key in ("losses", "validation"):
        assert facts[key] == pytest.approx(single[key], rel=5e-3)
    assert facts["norms"] == pytest.approx(single["norms"], rel=5e-2)


def check_equal(facts: dict, single: dict) -> None:
    """Everything, within what rounding in fp32 allows."""
    for name, weight in single["initial"].items():
        assert torch.equal(facts["initial"][name], weight), f"initial {name}"
    for name, gradient in single["gradients"].items():
        assert gradient.norm() > 0, name
        error = relative_error(facts["gradients"][name], gradient)
        assert error < 2e-5, f"gradient of {name}: relative error {error:.1e}"
    assert facts["first_norm"] == pytest.approx(single["first_norm"], rel=1e-6)
    expected = torch.stack([gradient.norm() for gradient in single["gradients"].values()]).norm().item()
    assert facts["first_norm"] == pytest.approx(expected, rel=1e-6)
    assert facts["losses"] == pytest.approx(single["losses"], rel=1e-5)
    assert facts["norms"] == pytest.approx(single["norms"], rel=1e-3)
    assert facts["validation"] == pytest.approx(single["validation"], rel=1e-5)
    for name, weight in single["final"].items():
        assert relative_error(facts["final"][name], weight) < 1e-3, f"final {name}"


def test_the_comparison_sees_a_missing_gradient_sum(workers: WorkerPools, seed_checkpoint: Path, single: dict) -> None:
    facts = run(workers, seed_checkpoint, (1, 2, True, 2), break_norms=True)
    for name, gradient in single["gradients"].items():
        error = relative_error(facts["gradients"][name], gradient)
        assert (error > 0.1) == ("layernorm" in name), f"{name}: {error:.1e}"


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("changes", [{"model__num_dense_heads": 0}, {"mosa__num_heads": 0}], ids=["mosa", "dense"])
def test_pure_models_do_not_depend_on_the_layout(workers: WorkerPools, changes: dict, sequence_parallel: bool) -> None:
    losses, norms = workers(1).run(tasks.losses_under_zero, tasks.tiny_config(**changes), 2)[0]
    layout = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": sequence_parallel}
    split = workers(2).run(tasks.losses_under_zero, tasks.tiny_config(**layout, **changes), 2)[0]
    assert split[0] == pytest.approx(losses, rel=1e-5)
    assert split[1] == pytest.approx(norms, rel=1e-4)


VARIANTS = {
    "swiglu": {"model__activation": "swiglu", "model__ffn_hidden_size": 40},
    "rmsnorm": {"model__normalization": "RMSNorm"},
    "tied": {"model__tie_embeddings": True},
    "grouped": {"model__num_query_groups": 2},
    "documents": {
        "model__attend_within_documents": True,
        "model__num_local_heads": 4,
        "model__local_window": 5,
        "mosa__selection_scope": "document",
    },
    "documents_by_sequence": {
        "model__attend_within_documents": True,
        "model__restart_rotary": True,
        "train__recompute": "full",
    },
    "local": {"model__num_local_heads": 4, "model__local_window": 5, "model__num_dense_heads": 0},
}


@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_model_do_not_depend_on_the_layout(
    workers: WorkerPools, tmp_path: Path, variant: str, zero: int
) -> None:
    changes = VARIANTS[variant]
    workers(1).run(tasks.write_seed_checkpoint, tasks.tiny_config(run__seed=77, **changes), tmp_path)
    one = workers(1).run(tasks.training_facts, tasks.tiny_config(parallel__zero_stage=0, **changes), tmp_path)[0]
    assert one["margin"] > 1e-5
    layout = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
    config = tasks.tiny_config(parallel__zero_stage=zero, train__micro_batch_size=2, **layout, **changes)
    check_equal(workers(4).run(tasks.training_facts, config, tmp_path)[0], one)
