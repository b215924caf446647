"""Training is the same at every layout: TP 1, 2 and 4, with and without sequence parallelism, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.distributed import tasks
from tests.distributed.pool import WorkerPools
from tests.head_kinds import OPTIONS

Cell = tuple[int, int, bool, int]  # ZeRO stage, tensor parallel size, sequence parallel, world size
DATA = (1, False, 2)
BOTH = (2, True, 4)
# ZeRO's stages differ only with several data-parallel ranks: there all stages are tested, with and without tensor
# parallelism. Layouts with one data-parallel rank are tested at one or two stages.
LAYOUTS: list[Cell] = [
    *((zero, *layout) for layout in (DATA, BOTH) for zero in (0, 1, 2, 3)),
    (0, 2, False, 2), (3, 2, False, 2), (1, 2, True, 2), (2, 4, False, 4), (1, 4, True, 4), (3, 4, True, 4),
]  # fmt: skip


@pytest.fixture(scope="module")
def seed_checkpoint(workers: WorkerPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of one process before the first step, with weights that no configuration below would draw."""
    path = tmp_path_factory.mktemp("seed")
    workers(1).run(tasks.write_seed_checkpoint, tasks.tiny_config(run__seed=77), path)
    return path


@pytest.fixture(scope="module")
def single(workers: WorkerPools, seed_checkpoint: Path) -> dict:
    """The facts of training in one process."""
    facts = workers(1).run(tasks.training_facts, tasks.tiny_config(parallel__zero_stage=0), seed_checkpoint)[0]
    # fp32 rounding changes scores by about 1e-7, which must not change a selection.
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


RECOMPUTED = [  # ZeRO-3 gathers a layer's weights once more
    ("attention", (0, *DATA)), ("attention", (3, *DATA)), ("attention", (1, *BOTH)), ("attention", (3, *BOTH)),
    ("attention", (2, 4, True, 4)), ("full", (1, *DATA)), ("full", (0, *BOTH)), ("full", (2, *BOTH)),
    ("full", (3, *BOTH)), ("full", (1, 4, True, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("recompute", "layout"), RECOMPUTED, ids=str)
def test_recompute_changes_nothing(
    workers: WorkerPools,
    seed_checkpoint: Path,
    single: dict,
    layout: Cell,
    recompute: str,
) -> None:
    facts = run(workers, seed_checkpoint, layout, train__recompute=recompute)
    check_equal(facts, single)


@pytest.mark.parametrize("layout", [(1, *DATA), (3, *DATA), (2, *BOTH), (3, *BOTH)], ids=str)
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


# If rounding to bf16 changes a selection, a MoSA head's gradients change. So this model, without MoSA heads, compares
# everything; the hybrid below compares only what does not depend on single selections.
@pytest.mark.parametrize(
    "layout",
    [*((zero, *DATA) for zero in (1, 2, 3)), (1, *BOTH), (3, *BOTH), (1, 2, False, 2), (2, 4, True, 4)],
    ids=str,
)
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


@pytest.mark.parametrize("layout", [(1, *DATA), (3, *BOTH), (2, 4, True, 4)], ids=str)
def test_a_hybrid_in_bf16_follows_fp32(workers: WorkerPools, seed_checkpoint: Path, single: dict, layout: Cell) -> None:
    facts = run(workers, seed_checkpoint, layout, train__precision="bf16")
    for name, weight in single["final"].items():
        if weight.dim() > 1:
            assert relative_error(facts["final"][name], weight) < 0.1, name
    for key in ("losses", "validation"):
        assert facts[key] == pytest.approx(single[key], rel=5e-3)
    assert facts["norms"] == pytest.approx(single["norms"], rel=5e-2)


def check_equal(facts: dict, single: dict) -> None:
    """Compare all facts, within the rounding of fp32."""
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


def test_the_comparison_detects_a_missing_gradient_sum(
    workers: WorkerPools, seed_checkpoint: Path, single: dict
) -> None:
    facts = run(workers, seed_checkpoint, (1, 2, True, 2), break_norms=True)
    for name, gradient in single["gradients"].items():
        error = relative_error(facts["gradients"][name], gradient)
        assert (error > 0.1) == ("layernorm" in name), f"{name}: {error:.1e}"


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("changes", [{"model__num_dense_heads": 0}, {"mosa__num_heads": 0}], ids=["mosa", "dense"])
def test_pure_models_do_not_depend_on_the_layout(workers: WorkerPools, changes: dict, sequence_parallel: bool) -> None:
    losses, norms = workers(1).run(tasks.engine_losses, tasks.tiny_config(**changes), 2)[0]
    layout = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": sequence_parallel}
    split = workers(2).run(tasks.engine_losses, tasks.tiny_config(**layout, **changes), 2)[0]
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
    "fixed_documents": {"model__num_fixed_heads": 4, "model__fixed_stride": 5, "model__attend_within_documents": True},
    "routing_documents": {
        "model__num_routing_heads": 4,
        "model__routing_clusters": 3,
        "model__attend_within_documents": True,
        "model__restart_rotary": True,
        "train__recompute": "full",
    },
    **OPTIONS,
}


# Variants that share weights or add tensors to a batch run at both stages, the others at one.
CELLS = [("swiglu", 1), ("rmsnorm", 3), ("tied", 1), ("tied", 3), ("grouped", 1), ("documents", 1), ("documents", 3)]
CELLS += [("documents_by_sequence", 3), ("local", 1), ("fixed_documents", 1)]
CELLS += [("fixed", 1), ("gated", 3), ("gated_local", 1), ("fixed_hybrid", 3), ("token_choice", 3)]
CELLS += [("routing", 1), ("routing_documents", 3)]


@pytest.fixture(scope="module")
def single_variant(workers: WorkerPools, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict]]:
    """A function that returns a seed checkpoint of a variant and the facts of one process."""

    @cache
    def single(variant: str) -> tuple[Path, dict]:
        path, changes = tmp_path_factory.mktemp(variant), VARIANTS[variant]
        workers(1).run(tasks.write_seed_checkpoint, tasks.tiny_config(run__seed=77, **changes), path)
        one = workers(1).run(tasks.training_facts, tasks.tiny_config(parallel__zero_stage=0, **changes), path)[0]
        assert one["margin"] > 1e-5
        return path, one

    return single


@pytest.mark.parametrize(("variant", "zero"), CELLS)
def test_variants_of_the_model_do_not_depend_on_the_layout(
    workers: WorkerPools, single_variant: Callable[..., tuple[Path, dict]], variant: str, zero: int
) -> None:
    path, one = single_variant(variant)
    check_equal(run(workers, path, (zero, *BOTH), **VARIANTS[variant]), one)
