"""Grids of models at equal cost: reading them, numbers of heads, learning rates, results and reports."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from megatron_mosa.attention import dense_head_flops, mosa_head_flops
from megatron_mosa.cli import app
from megatron_mosa.config import Config, config_to_dict, load_config, save_config
from megatron_mosa.data import Manifest, Mixture
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.model import model_flops, paper_flops
from megatron_mosa.parallel import launch_environment
from megatron_mosa.tools.decoding import bench
from megatron_mosa.tools.decoding.lengths import STEPS
from megatron_mosa.tools.grid import plan as plan_module
from megatron_mosa.tools.grid import report, results
from megatron_mosa.tools.grid.budget import Cost, _closest
from megatron_mosa.tools.grid.grid import Evaluation, read_grid
from megatron_mosa.tools.grid.kinds import KINDS, kv_bytes
from megatron_mosa.tools.grid.launch import LocalLauncher
from megatron_mosa.tools.grid.match import matched, table
from megatron_mosa.tools.grid.models import places
from megatron_mosa.tools.grid.plan import Cell, Model, Plan, config_hash, plan_models
from megatron_mosa.tools.grid.report import markdown, write_report
from megatron_mosa.tools.grid.request import Request
from megatron_mosa.tools.grid.results import Row, measured, read_results, write_results
from megatron_mosa.tools.grid.run import _refuse_unfinished, prepare_output
from megatron_mosa.tools.grid.work import Work
from megatron_mosa.tools.scaling.isoflop import most_heads, solve_isoflop
from tests.loaded import loaded_python

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "paper" / "tiny.yaml"
DENSE_FLAG = {name: kind.is_dense for name, kind in KINDS.items()}
GRID: dict[str, Any] = {
    "name": "trial",
    "base": str(TINY),
    "overrides": {"train.steps": 1500, "optimizer.warmup_steps": 100},
    "sizes": {"tiny": {}},
    "corpora": {"text": {"data.path": "text"}},
    "relative_to": "dense",
    "members": {"dense": {"kind": "dense"}, "mosa": {"kind": "expert_choice", "sparsity": [32, 64]}},
}


@pytest.fixture(autouse=True)
def datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dataset has 100M tokens of training text and a vocabulary of 8000, by a tokenizer of its own."""

    def open_mixture(data: Any, *, reads_all: bool = True) -> Mixture:
        if data.path == "missing":
            raise UserError("data.path=missing does not exist; build it with: mosa data build CONFIG")
        splits = {"train": {"tokens": 100_000_000}, "validation": {"tokens": 1_000_000}}
        return Mixture(
            (Path(data.path or "blended"),), (1.0,), (Manifest("hash", "bpe", 8000, 0, splits, {"tokenizer": None}),)
        )

    monkeypatch.setattr(plan_module, "open_mixture", open_mixture)


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
    return path


def models(folder: Path, cost_of: Any = None, **changes: Any) -> list[Model]:
    return plan_models(read_grid(write(folder, **changes), DENSE_FLAG), cost_of)


def members(**more: dict[str, Any]) -> dict[str, Any]:
    return {"dense": {"kind": "dense"}, **more}


# --- numbers of heads


def test_expert_choice_and_thresholds_have_the_paper_s_numbers_of_heads(tmp_path: Path) -> None:
    given = {"sparsity": [2, 4, 8, 16, 32, 64, 128, 256]}
    found = models(
        tmp_path,
        members=members(mosa={"kind": "expert_choice", **given}, threshold={"kind": "threshold", **given}),
    )
    assert [model.heads for model in found] == [9, *2 * [13, 31, 69, 142, 276, 505, 848, 1277]]
    assert found[0].share == 1 and all(0.99 < model.share <= 1 for model in found)
    assert {model.config.mosa.selection for model in found[9:]} == {"threshold"}
    assert [model.config.model.num_dense_heads for model in found] == [9] + 16 * [4]
    assert found[5].heads == solve_isoflop(load_config(TINY), 32).num_mosa_heads


def test_numbers_of_heads_of_other_kinds_against_an_independent_count(tmp_path: Path) -> None:
    """By the formulas of the paper, written out: T = 1024, h = 512, h' = 64, six layers of 9 dense heads."""
    length, width, head = 1024, 512, 64
    budget = 5 * dense_head_flops(width, head, length)  # of a layer: what the other five dense heads cost
    fixed = max(n for n in range(1, 2000) if n * (8 * width * head * 32 + 4 * head * 32**2) <= budget)

    routed = 6 * width * head * length + 4 * head * 32**2 * 32 + 2 * head * length  # of a head, with clusters of 32

    def token_choice(heads: int) -> float:
        return heads * mosa_head_flops(width, head, length, length * round(heads / 32) / heads)

    found = models(
        tmp_path,
        members=members(
            gated={"kind": "dense", "overrides": {"model.attention_gate": True}},
            fixed={"kind": "fixed", "sparsity": 32},
            routing={"kind": "routing", "sparsity": 32},
            tokens={"kind": "token_choice", "sparsity": 32},
        ),
    )
    dense, gated, static, routing, tokens = found
    assert (dense.heads, gated.heads, static.heads) == (9, 9, fixed)
    assert routing.heads == int(budget // routed)
    assert tokens.heads == max(n for n in range(16, 1000) if token_choice(n) <= budget)
    assert 1 < gated.share < 1.005  # its own number of heads, with the gate on top
    assert (static.config.model.num_fixed_heads, static.config.mosa.num_heads) == (fixed, 0)
    assert (tokens.config.mosa.num_heads, tokens.config.model.num_fixed_heads) == (tokens.heads, 0)


def test_equal_executed_flops(tmp_path: Path) -> None:
    dense, *found = models(tmp_path, equal="executed_flops")
    for model in found:
        more = replace(model.config, mosa=replace(model.config.mosa, num_heads=model.heads + 1))
        budget = model_flops(dense.config, 8000)
        assert model_flops(model.config, 8000) <= budget < model_flops(more, 8000)
    assert [model.heads for model in found] != [276, 505]  # causal attention is counted once


def test_equal_step_time_is_measured(tmp_path: Path) -> None:
    asked: list[int] = []

    def seconds(config: Config) -> float:
        asked.append(config.mosa.num_heads)
        return 0.05 + 0.01 * config.model.num_dense_heads + 0.0005 * config.mosa.num_heads

    dense, half, _ = models(tmp_path, lambda equal, data: Cost(equal, seconds), equal="step_time")
    assert dense.heads == 9 and half.heads == pytest.approx(100, abs=6)  # 5 dense heads take as long as 100
    assert half.share == pytest.approx(1, abs=0.02)
    assert len(asked) < 20


@pytest.mark.parametrize("slope", [1e-6, 1e-3, 1e-1])
def test_a_measured_budget_is_met_as_well_as_heads_allow(slope: float) -> None:
    assert _closest(lambda n: 1 + slope * n, 1 + 50 * slope, 300, 1) in (
        range(1, 2000) if slope < 1e-5 else range(40, 70)
    )
    assert _closest(lambda n: 2.0 + n, 1.0, 10, 1) == 0  # not one head fits
    assert _closest(lambda n: 2.0 + n, 3.0, 1, 1) == 1
    assert _closest(lambda n: 2.0, 1.0, 64, 2) == 0  # time that does not depend on the heads
    assert _closest(lambda n: 1.0, 1.0, 64, 2) in (32, 64)


def test_heads_are_a_multiple_of_the_tensor_parallel_size(tmp_path: Path) -> None:
    given = GRID["overrides"] | {"parallel.tensor_model_parallel_size": 2}
    changes = {"overrides": given, "sizes": {"tiny": {"model.num_dense_heads": 8}}, "processes": 2}
    _, low, high = models(tmp_path, **changes)
    assert low.heads % 2 == high.heads % 2 == 0
    exact = solve_isoflop(load_config(TINY, ["model.num_dense_heads=8"]), 32).num_mosa_heads
    assert low.heads in (exact, exact - 1)


def test_most_heads_with_ripples() -> None:
    costs = {n: 10 * round(n / 8) + 100 / n for n in range(1, 2000)}  # falls between two steps
    for budget in (5, 50, 111, 112.3, 900):
        expected = max((n for n, cost in costs.items() if cost <= budget), default=0)
        assert most_heads(costs.__getitem__, budget, ripple=8) == expected


@pytest.mark.parametrize(
    ("member", "parts"),
    [
        (
            {"kind": "expert_choice", "sparsity": 2, "dense_heads": 9},
            ["no expert_choice head", "beside 9", "at most 8"],
        ),
        (
            {"kind": "fixed", "sparsity": 2, "dense_heads": 9},
            ["no fixed head of sparsity 2", "dense_heads to at most 8"],
        ),
        ({"kind": "threshold", "sparsity": 1, "dense_heads": 8}, ["no threshold head", "dense_heads to at most 7"]),
    ],
)
def test_a_budget_that_no_head_fits_names_what_would(tmp_path: Path, member: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        models(tmp_path, members=members(other=member))
    for part in ["members.other", "54.76 GFLOP", "paper_flops", *parts]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_kv_bytes_at_8k_against_counts_by_hand() -> None:
    pair = 2 * 6 * 64 * 2  # a key and a value of 64 numbers of 2 bytes in 6 layers
    assert kv_bytes(load_config(TINY), 8192) == pair * 9 * 8192
    options = ["model.num_dense_heads=4", "mosa.num_heads=276", "mosa.sparsity=32"]
    assert kv_bytes(load_config(TINY, options), 8192) == pair * (4 * 8192 + 276 * 256)
    chosen = [*options, "mosa.selection=token_choice"]  # round(276 / 32) = 9 heads for each token
    assert kv_bytes(load_config(TINY, chosen), 8192) == pair * (4 * 8192 + 9 * 8192)
    local = ["model.num_dense_heads=0", "model.num_local_heads=4", "model.local_window=32"]
    fixed = [*local, "model.num_fixed_heads=10", "model.fixed_stride=64"]
    assert kv_bytes(load_config(TINY, fixed), 8192) == pair * (4 * 32 + 10 * 128)
    grouped = ["model.num_dense_heads=8", "model.num_query_groups=2"]
    assert kv_bytes(load_config(TINY, grouped), 8192) == pair * 2 * 8192


# --- bad grids


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"member": {}}, ["unknown key 'member'", "did you mean 'members'?"]),
        ({"name": "a b"}, ["name must be a name of at most 64 letters", "got 'a b'"]),
        ({"base": None}, ["base is missing"]),
        ({"base": "nowhere.yaml"}, ["configuration file 'nowhere.yaml' does not exist"]),
        ({"sizes": {}}, ["sizes must be names"]),
        ({"sizes": {"a-b": {}}}, ["a name in sizes must be", "'a-b'"]),
        ({"sizes": {"tiny": {"num_layers": 2}}}, ["sizes.tiny must be section.key: value"]),
        ({"sizes": {"tiny": {"model.layers": 2}}}, ["sizes.tiny", "unknown key 'model.layers'"]),
        ({"corpora": {"text": {"data.path": "missing"}}}, ["corpora.text: data.path=missing does not exist"]),
        ({"equal": "flops"}, ["equal must be one of paper_flops, executed_flops, step_time, got 'flops'"]),
        ({"relative_to": "dens"}, ["relative_to must be one of dense, mosa, got 'dens'"]),
        ({"relative_to": "mosa"}, ["relative_to=mosa", "kind dense"]),
        ({"processes": 0}, ["processes must be an integer of at least 1 and at most 1024, got 0"]),
        ({"passes": "all"}, ["passes must be a number above 0 and at most 2147483647, got 'all'"]),
        ({"overrides": {"run.seed": 3}}, ["overrides must not set run.seed", "remove it there"]),
        ({"evaluate": 64}, ["evaluate must be keys such as {samples: 64}, or {} for the defaults, got 64"]),
        ({"evaluate": {"windows": 64}}, ["unknown key 'evaluate.windows'", "samples"]),
        ({"evaluate": {"samples": 1}}, ["evaluate.samples must be an integer of at least 2 and", "got 1"]),
        ({"evaluate": {"decode": [0]}}, ["evaluate.decode must be different integers of at least 1", "got [0]"]),
        ({"members": members(x={"kind": "dens"})}, ["members.x.kind must be one of dense, fixed", "got 'dens'"]),
        ({"members": members(x={"kind": "dense", "sparsity": 2})}, ["members.x.sparsity=2", "remove the key"]),
        ({"members": members(x={"kind": "fixed"})}, ["members.x.sparsity is missing", "sparsity: [16, 32]"]),
        ({"members": members(x={"kind": "fixed", "sparsity": [8, 8]})}, ["members.x.sparsity must be different"]),
        ({"members": members(x={"kind": "fixed", "sparsity": 0.5})}, ["2147483647, such as", "got 0.5"]),
        ({"members": members(x={"kind": "fixed", "sparsity": 8, "sead": 1})}, ["unknown key 'members.x.sead'"]),
        ({"members": members(x={"kind": "fixed", "sparsity": 8, "tune_at": 4})}, ["members.x.tune_at", "got 4"]),
        ({"members": members(x={"kind": "fixed", "sparsity": 8, "seeds": {4: [1]}})}, ["4 is not a sparsity"]),
        ({"seeds": []}, ["members.dense.seeds must be at least one integer, such as [1], got []"]),
        ({"members": members(x={"kind": "fixed", "sparsity": 8, "seeds": {8: []}})}, ["members.x.seeds must be at"]),
        (
            {"sizes": {64 * "s": {}}, "corpora": {64 * "c": {"data.path": "text"}},
             "members": {64 * "d": {"kind": "dense"}}, "relative_to": 64 * "d", "learning_rates": [0.001, 0.00025]},
            ["name of a run must have at most 200 characters, got 210 of sss", "d-seed1-lr0.00025; shorten the name"],
        ),
        (
            {"members": members(x={"kind": "dense", "learning_rate_of": "dense"})},
            ["members.x.learning_rate_of must be a member with learning_rates, got 'dense'"],
        ),
        ({"members": members(x={"kind": "dense", "learning_rate_of": ["mosa"]})}, ["learning_rates, got ['mosa']"]),
        (
            {"members": members(x={"kind": "dense", "learning_rate_of": "mosa", "learning_rates": [1e-3]})},
            ["members.x.learning_rate_of=mosa stands in place of learning_rates; remove one of them"],
        ),
        (
            {
                "learning_rates": [1e-3, 2e-3],
                "members": GRID["members"] | {"x": {"kind": "dense", "learning_rate_of": "mosa"}},
            },
            ["members.x.learning_rate_of=mosa, which tries its learning rates for each of several", "give it tune_at"],
        ),
        ({"overrides": GRID["overrides"] | {"data.tokenizer": "other"}}, ["corpora.text: data.tokenizer=other, but"]),
        (
            {"members": members(x={"kind": "dense", "overrides": {"data.tokenizer": "other"}})},
            ["members.x has data.tokenizer=other, but members.dense has None"],
        ),
        (
            {"overrides": GRID["overrides"] | {"data.sequence_length": 1_000_000}},
            ["corpora.text: data.sequence_length must be at most 999999"],
        ),
        (
            {"members": members(x={"kind": "fixed", "sparsity": 8, "overrides": {"model.num_fixed_heads": 3}})},
            ["members.x.overrides must not set model.num_fixed_heads", "heads: N"],
        ),
        (
            {"members": members(x={"kind": "fixed", "sparsity": 8, "overrides": {"mosa.num_heads": 3}})},
            ["members.x.overrides must not set mosa.num_heads: kind fixed has no such heads; remove it there"],
        ),
        (
            {"overrides": GRID["overrides"] | {"model.num_fixed_heads": 4, "mosa.num_heads": 0}},
            ["overrides must not set model.num_fixed_heads: kind and heads of each member set it; remove it there"],
        ),
        (
            {"members": members(x={"kind": "fixed", "sparsity": 8, "overrides": {"model.fixed_stride": 8}})},
            ["members.x.overrides must not set model.fixed_stride", "kind fixed sets it"],
        ),
        (
            {"members": members(x={"kind": "fixed", "sparsity": 8, "overrides": {"data.sequence_length": 512}})},
            ["members.x has data.sequence_length=512, but members.dense has 1024", "members must share"],
        ),
        (
            {"members": members(x={"kind": "fixed", "sparsity": 8, "overrides": {"data.path": "other"}})},
            ["members.x has data.path=other, but members.dense has text"],
        ),
        (
            {"members": members(x={"kind": "fixed", "sparsity": 8, "overrides": {"train.global_batch_size": 32}})},
            ["train.global_batch_size=32, but members.dense has 64"],
        ),
        (
            {"overrides": GRID["overrides"] | {"train.steps": 3000}},
            ["corpora.text: text has 100,000,000 training tokens", "at most 1,525", "passes: 1.97"],
        ),
        (
            {"evaluate": {"decode_context": 999_904}},
            ["evaluate.decode_context=999,904 needs 1,000,001 tokens", "has 1,000,000; lower it to at most 999,903"],
        ),
        (
            {"overrides": GRID["overrides"] | {"train.stop_after_step": 1000}},
            ["train.stop_after_step=1000 ends a run before train.steps=1500", "remove it"],
        ),
        (
            {
                "equal": "executed_flops",
                "overrides": GRID["overrides"] | {"model.attend_within_documents": True},
            },
            ["executed_flops counts attention over whole sequences", "set equal: paper_flops or step_time"],
        ),
        (
            {"overrides": GRID["overrides"] | {"train.steps": 50}},
            ["optimizer.warmup_steps must be at most train.steps=50"],
        ),
    ],
)  # fmt: skip
def test_a_bad_grid_is_rejected_in_one_line(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        models(tmp_path, **changes)
    assert "\n" not in str(error.value)
    for part in [str(tmp_path / "grid.yaml"), *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "run: {name: x}", "members: {a: 1, a: 2}"])
def test_a_file_that_is_no_grid(tmp_path: Path, text: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="is not|must hold keys"):
        read_grid(path, DENSE_FLAG)
    with pytest.raises(UserError, match="does not exist"):
        read_grid(tmp_path / "none.yaml", DENSE_FLAG)


def test_more_passes_over_a_small_corpus_when_asked_for(tmp_path: Path) -> None:
    assert models(tmp_path, overrides={"train.steps": 5000}, passes=4, members=members())[0].config.train.steps == 5000


def test_the_context_of_decoding_is_one_that_decode_bench_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blend has any: mosa decode-bench takes one dataset, so that random tokens are decoded."""
    data: Any = SimpleNamespace(path="text")
    opened = plan_module.open_mixture(data)
    monkeypatch.setattr(bench, "open_given_dataset", lambda _: opened)
    monkeypatch.setattr(bench, "ValidationSamples", lambda *_, **__: [{"tokens": torch.zeros(1_000_000)}])
    model: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=8000))
    for context, fits in ((999_903, True), (999_904, False)):
        raises = nullcontext() if fits else pytest.raises(UserError, match="at most 999,?903, or")
        with raises:
            models(tmp_path, evaluate={"decode_context": context})
        with raises:
            bench._tokens(model, 1, bench.BenchOptions(tmp_path, [1], context, STEPS, Path("text")))
    blend = {"data.path": None, "data.blend": ["1.0 text"]}
    assert models(tmp_path, corpora={"text": blend}, evaluate={"decode_context": 999_904})


@pytest.mark.parametrize("path", sorted((CONFIGS / "grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_grids_of_the_project_can_be_planned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    assert plan_models(read_grid(path, DENSE_FLAG))


# --- cells


def request(folder: Path, **changes: Any) -> Request:
    grid = read_grid(write(folder, **changes), DENSE_FLAG)
    return Request(grid, folder / "out", 1, LocalLauncher("cpu", 1, 1, ()))


def settle(work: Work, name: str, loss: float | None, dataset_hash: str = "x") -> None:
    """Write the result of a cell, as if it had been run."""
    status = results.GAVE_UP if loss is None else results.DONE
    result = {"status": status, "loss": loss, "perplexity": loss and math.exp(loss), "dataset_hash": dataset_hash}
    path = work.folder / "cells" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    work._results.pop(name, None)


def names(cells: Sequence[Cell]) -> list[str]:
    return [cell.name for cell in cells]


def test_the_best_learning_rate_of_the_first_seed_is_taken_for_the_others(tmp_path: Path) -> None:
    dense = {"kind": "dense", "learning_rates": [1e-3, 2e-3, 4e-3], "seeds": [7, 8]}
    wanted = request(tmp_path, members={"dense": dense})
    work = Work(wanted, wanted.plan())
    trials = [f"tiny-text-dense-seed7-lr{rate}" for rate in ("0.001", "0.002", "0.004")]
    assert (names(work.cells()), work.later()) == (trials, 1)
    for name, loss in zip(trials, (2.0, 1.5, None), strict=True):
        assert work.later() == 1
        settle(work, name, loss)
    assert (names(work.cells()), work.later()) == ([*trials, "tiny-text-dense-seed8-lr0.002"], 0)
    config = work.cells()[-1].config(tmp_path)
    assert (config.run.seed, config.optimizer.learning_rate) == (8, 2e-3)
    assert config.optimizer.min_learning_rate == pytest.approx(2e-4)  # the same share as in the base
    for name in trials:
        settle(work, name, None)
    assert work.later() == 1  # no learning rate works: its other seed is never run
    assert work.without_a_rate() == ["tiny-text-dense"]


def test_a_learning_rate_found_at_one_sparsity_serves_the_others(tmp_path: Path) -> None:
    mosa = {"kind": "expert_choice", "sparsity": [16, 32], "learning_rates": [1e-3, 2e-3], "tune_at": 32}
    mosa["seeds"] = {32: [1, 2]}
    wanted = request(tmp_path, members=members(mosa=mosa))
    work = Work(wanted, wanted.plan())
    tried = ["tiny-text-mosa-rho32-seed1-lr0.001", "tiny-text-mosa-rho32-seed1-lr0.002"]
    assert (names(work.cells()), work.later()) == (["tiny-text-dense-seed1", *tried], 2)
    for name, loss in zip(tried, (1.5, 1.6), strict=True):
        settle(work, name, loss)
    later = ["tiny-text-mosa-rho16-seed1-lr0.001", *tried, "tiny-text-mosa-rho32-seed2-lr0.001"]
    assert names(work.cells()) == ["tiny-text-dense-seed1", *later]


def test_a_learning_rate_found_for_one_member_serves_another(tmp_path: Path) -> None:
    mosa = {"kind": "expert_choice", "sparsity": [16, 32], "learning_rates": [1e-3, 2e-3], "tune_at": 32}
    gate = {"kind": "dense", "learning_rate_of": "mosa", "seeds": [3, 4]}
    sizes = {"tiny": {}, "wide": {"model.hidden_size": 1024}}
    wanted = request(tmp_path, members=members(mosa=mosa, gate=gate), sizes=sizes)
    work = Work(wanted, wanted.plan())
    assert not [name for name in names(work.cells()) if "gate" in name] and work.later() == 2 * (1 + 2)
    for size, losses in (("tiny", (1.5, 1.4)), ("wide", (1.2, 1.3))):
        for rate, loss in zip(("0.001", "0.002"), losses, strict=True):
            settle(work, f"{size}-text-mosa-rho32-seed1-lr{rate}", loss)
    found = [cell for cell in work.cells() if "gate" in cell.name]
    assert names(found) == [f"{size}-text-gate-seed{seed}-lr{rate}" for size, rate in
                            (("tiny", "0.002"), ("wide", "0.001")) for seed in (3, 4)]  # fmt: skip
    assert found[0].config(tmp_path).optimizer.learning_rate == 2e-3 and work.later() == 0


def test_steps_measured_alone_replace_those_of_runs(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    work = Work(wanted, wanted.plan())
    (cell, *_) = work.cells()
    settle(work, cell.name, 2.0)
    (tmp_path / "out" / "timings").mkdir()
    config, vocab_size = cell.model.config, cell.model.dataset.vocab_size
    measured_there = {"milliseconds": [30.0, 10.0, 20.0], "allocated_gib": 3.0, "device": "NVIDIA H100"}
    there = replace(wanted.timings, device="NVIDIA H100 80GB")
    there.path(config, vocab_size).write_text(json.dumps(measured_there))
    assert wanted.timings.find(config, vocab_size) is None  # of this device
    row = work.rows()[0]
    assert (row.step_seconds, row.step_alone, row.peak_memory_gib) == (0.02, True, 3.0)
    assert (row.step_device, row.device) == ("NVIDIA H100", "")
    assert replace(there, processes=2).find(config, vocab_size) is None
    assert work.rows()[1].step_seconds is None
    seeds = Cell(cell.model, 5, 3e-4).config(tmp_path)
    assert there.find(seeds, vocab_size) == there.find(config, vocab_size)  # the same model


def evaluation(causal: float | None, flips: float | None) -> str:
    """Return what mosa evaluate writes."""
    loss = {"loss": 2.0, "error": 0.1}
    found = {"full_sequence": loss, "causal": causal and loss | {"loss": causal}, "flip_rate": flips}
    return json.dumps(found | {"leak": {"mean": 0.5, "error": 0.25}})


def test_numbers_that_are_not_defined_count_as_measured(tmp_path: Path) -> None:
    undefined = {"loss": None, "error": None}
    found = {"full_sequence": undefined, "causal": undefined, "flip_rate": None, "leak": {"mean": None, "error": None}}
    (tmp_path / "cell.json").write_text(json.dumps(found))
    values, reasons = results.evaluated(tmp_path / "cell.json", Evaluation()) or ({}, {})
    assert set(values.values()) == {None} and len(values) == 5
    assert reasons["causal_loss"] == reasons["leak"] == "it is not a finite number"
    without_error = row("mosa", 1, 1.8, evaluated_loss=2.0, leak=0.5, not_measured={"flip_rate": "it has none"})
    assert "| mosa |  | +0.5000 |  |" in markdown([without_error], {})


def test_what_is_measured_of_trained_models_and_why_the_rest_is_not(tmp_path: Path) -> None:
    asked = {"samples": 8, "decode": [4, 1], "decode_context": 100}
    some = members(
        choice={"kind": "expert_choice", "sparsity": 32},
        routing={"kind": "routing", "sparsity": 32},
        late={"kind": "fixed", "sparsity": 32},
    )
    wanted = request(tmp_path, members=some, evaluate=asked)
    evaluate = Evaluation(8, 64, (1, 4), 100)
    assert wanted.grid.evaluation == evaluate
    work = Work(wanted, wanted.plan())
    cells, folder = work.cells(), tmp_path / "out"
    for cell in cells:
        settle(work, cell.name, 2.0)
    (folder / "evaluations").mkdir()
    for cell, text in zip(cells, (evaluation(2.0, None), evaluation(2.5, 0.25), evaluation(None, None)), strict=False):
        (folder / "evaluations" / f"{cell.name}.json").write_text(text)
    dense = cells[0].model
    path = work.timings.decoding_path(dense, evaluate)
    path.parent.mkdir(parents=True)
    times = [{"batch": n, "milliseconds_per_step": n / 2} for n in (1, 4)]
    path.write_text(json.dumps({"rows": times, "device": "NVIDIA H100"}))
    (folder / "runs" / cells[3].name / "checkpoints" / "step-00001500").mkdir(parents=True)

    first, choice, routing, late = rows = work.rows()
    assert first.decode_device == "NVIDIA H100"
    assert (first.leak, first.leak_error, first.causal_loss) == (0.5, 0.25, 2.0)
    assert (first.decode_ms, first.decode_context) == ({"1": 0.5, "4": 2.0}, 100)
    assert (choice.evaluated_loss, choice.causal_loss, choice.flip_rate) == (2.0, 2.5, 0.25)
    assert first.not_measured == {"flip_rate": "it has no MoSA heads that select tokens in the first half of a window"}
    assert choice.not_measured == {"decode_ms": "it looks ahead, so that nothing can be decoded"}
    assert routing.not_measured["causal_loss"] == "it has no causal counterpart"
    assert set(late.not_measured.values()) == {"not measured yet"}

    write_results(rows, folder)
    assert read_results(folder) == rows
    text = markdown(rows, {})
    for part in (
        "| dense | 0 | +0.5000 (0.2500) |  | 0.50 | 2.00 |",
        "| choice rho 32 | +0.5000 | +0.5000 (0.2500) | 25.0 % |  |  |",
        "after 100 tokens",
        "- flip rate of dense, routing rho 32: it has no MoSA heads",
        "- decoding of choice rho 32, routing rho 32: it looks ahead, so that nothing can be decoded",
        "- leak of late rho 32: not measured yet",
    ):
        assert part in text, part


def test_decoding_is_measured_on_each_corpus(tmp_path: Path) -> None:
    corpora = {name: {"data.path": name} for name in ("books", "code")}
    found = models(tmp_path, members=members(), corpora=corpora)
    books, code = (replace(one, dataset=replace(one.dataset, fingerprint=one.corpus)) for one in found)
    asked, timings = Evaluation(decode=(1,)), request(tmp_path).timings
    path = timings.decoding_path(books, asked)
    path.parent.mkdir(parents=True)
    times = {"rows": [{"batch": 1, "milliseconds_per_step": 0.5}], "model": "out/runs/tiny-books-dense-seed1"}
    path.write_text(json.dumps(times))
    assert timings.find_decoding(books, asked) and not timings.find_decoding(code, asked)
    path.rename(timings._decoding_path(books, asked, ""))  # as earlier versions named it
    for elsewhere in (True, False):
        measured_on = [one for one in (books, code) if timings.find_decoding(one, asked, elsewhere=elsewhere)]
        assert measured_on == [books]


def test_evaluations_of_other_samples_are_repeated(tmp_path: Path) -> None:
    path, asked = tmp_path / "cell.json", Evaluation(8, 16)
    found = json.loads(evaluation(2.5, 0.25))
    for more, is_as_asked in (
        ({"samples": 8}, True),  # of an earlier version
        ({"samples": 4}, False),
        ({"samples": 4, "settings": {"samples": 8, "calibration_samples": 16}}, True),  # a short split
        ({"samples": 4, "settings": {"samples": 8, "calibration_samples": None}}, True),  # nothing was calibrated
        ({"samples": 8, "settings": {"samples": 8, "calibration_samples": 4}}, False),
        ({"samples": 8, "settings": {"samples": 9, "calibration_samples": 16}}, False),
        ({"settings": "damaged"}, False),
    ):
        path.write_text(json.dumps(found | more))
        assert (results.evaluated(path, asked) is not None) == is_as_asked, more


def test_checkpoints_are_removed_when_nothing_is_left_to_be_measured_with_them(tmp_path: Path) -> None:
    wanted = request(tmp_path, members=members(choice={"kind": "expert_choice", "sparsity": 32}), evaluate={})
    wanted = replace(wanted, removes_checkpoints=True)
    work = Work(wanted, wanted.plan())
    dense, choice = work.cells()
    kept = {cell.name: wanted.output / "runs" / cell.name / "checkpoints" for cell in (dense, choice)}
    for cell in (dense, choice):
        settle(work, cell.name, 2.0)
        (kept[cell.name] / "step-00001500").mkdir(parents=True)
    (wanted.output / "evaluations").mkdir()
    work._write()
    assert all(path.is_dir() for path in kept.values())
    for cell in (dense, choice):
        (wanted.output / "evaluations" / f"{cell.name}.json").write_text(evaluation(2.0, 0.0))
    work._write()
    assert [path.is_dir() for path in kept.values()] == [True, False]  # dense has not been decoded yet
    assert next(work._measurements())[0] == "tiny-text-dense: measuring decoding alone"
    path = work.timings.decoding_path(dense.model, Evaluation())
    path.parent.mkdir(parents=True)
    path.write_text('{"rows": []}')
    work._write()
    assert not any(path.is_dir() for path in kept.values())


def test_a_program_of_a_grid_is_no_rank_of_the_job_that_runs_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLURM_STEP_NUM_TASKS", "8"), ("SLURM_PROCID", "3"), ("WORLD_SIZE", "8"), ("RANK", "3")):
        monkeypatch.setenv(name, value)
    environment = LocalLauncher("cpu", 1, 1, ()).command(["pretrain"], "", 1)[1]
    monkeypatch.setattr(os, "environ", environment)
    assert launch_environment() == (0, 1, 0)


def test_why_a_program_failed_is_taken_from_its_own_output(tmp_path: Path) -> None:
    """And not from that of an earlier start, which is in the same log."""

    class Killed(LocalLauncher):
        def launch(self, arguments: Sequence[str], run: Path, log: Path, ranks: int | None = None) -> Any:
            with log.open("a") as file:
                file.write(f"{arguments[0]} begins\n")
            return SimpleNamespace(poll=lambda: -9)

    wanted = replace(request(tmp_path, evaluate={}), local=Killed("cpu", 1, 1, ()))
    prepare_output(wanted.output, wanted.grid)
    work = Work(wanted, wanted.plan())
    cell = work.cells()[0]
    (wanted.output / "logs" / f"{cell.name}.log").write_text("error: data/text does not exist\n")
    work._start_training(cell)
    work._reap()
    assert work.result(cell)["reason"] == "exit code -9: pretrain begins"
    work._start_evaluation(cell)
    work._reap()
    assert work.failures == [f"{cell.name}: mosa evaluate failed with exit code -9: evaluate begins"]


def test_measuring_ends_in_time_and_says_what_is_left(tmp_path: Path) -> None:
    wanted = replace(request(tmp_path), deadline=1.0)  # long ago
    work = Work(wanted, wanted.plan())
    for cell in work.cells():
        settle(work, cell.name, 2.0)
    assert (work.measure(), work.unmeasured) == ("out of time", 3)
    rows = work.rows()
    with pytest.raises(RunError, match="out of time with 3 measurements left; run the same command again to continue"):
        _refuse_unfinished(work, rows, "out of time")


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_while_a_process_is_started_is_not_lost(number: str) -> None:
    code = f"""
import os, signal, subprocess
from megatron_mosa.tools.processes import signals_as_interrupt

os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.{number}))
with signals_as_interrupt() as check:
    try:
        subprocess.Popen(["true"], preexec_fn=lambda: None).wait()  # Python ignores what the handler raises here
        print("started")
        check()
    except KeyboardInterrupt:
        print("interrupted")
"""
    done = subprocess.run([loaded_python(), "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["started", "interrupted"], done.stderr


def test_given_numbers_of_heads_are_models_of_their_own(tmp_path: Path) -> None:
    search = {"kind": "expert_choice", "sparsity": 32, "heads": [12, 16]}
    found = models(tmp_path, members=members(search=search))
    assert [model.name for model in found[1:]] == ["tiny-text-search-rho32-heads12", "tiny-text-search-rho32-heads16"]
    assert all(model.is_given and model.share < 0.8 for model in found[1:])


def test_results_of_another_grid_are_rejected(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    prepare_output(wanted.output, wanted.grid)
    prepare_output(wanted.output, wanted.grid)
    work = Work(wanted, wanted.plan())
    cell = work.cells()[0]
    save_config(cell.config(wanted.output), wanted.output / "configs" / f"{cell.name}.yaml")
    work.refuse_other_results()
    changed = request(tmp_path, overrides=GRID["overrides"] | {"optimizer.beta2": 0.9})
    Work(changed, changed.plan()).refuse_other_results()  # it has taken no step yet
    run = wanted.output / "runs" / cell.name
    run.mkdir()
    (run / "metrics.jsonl").touch()

    with pytest.raises(UserError, match="holds another grid's results: equal=paper_flops, now executed_flops; give"):
        prepare_output(wanted.output, request(tmp_path, equal="executed_flops").grid)
    with pytest.raises(UserError, match=r"with optimizer.beta2=0.999, now 0.9; set optimizer.beta2: 0.999 under"):
        Work(changed, changed.plan()).refuse_other_results()
    saved_elsewhere = request(tmp_path, overrides=GRID["overrides"] | {"checkpoint.interval": 7})
    Work(saved_elsewhere, saved_elsewhere.plan()).refuse_other_results()  # does not change a result
    settle(work, cell.name, 2.0)
    with pytest.raises(UserError, match="holds results of another dataset: text had the hash x when"):
        work.refuse_other_results()

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(UserError, match="is not empty and does not hold a grid"):
        prepare_output(tmp_path / "full", wanted.grid)
    (wanted.output / "grid.json").write_text("{")
    with pytest.raises(UserError, match=r"its grid.json is damaged"):
        prepare_output(wanted.output, wanted.grid)


DECISIVE = (
    "checkpoint.initialize_from=other", "resilience.max_skipped_steps=7", "resilience.on_spike=rewind",
    "resilience.spike_sigmas=7", "resilience.spike_window=7", "resilience.max_rewinds=7", "fault_injection.fault=nan",
)  # fmt: skip
"""What counts among sections of which most does not."""


@pytest.mark.parametrize("change", DECISIVE)
def test_results_of_other_settings_are_rejected_or_trained_again(tmp_path: Path, change: str) -> None:
    """A run that gave up as it might not now is trained from its start; what else has other settings is rejected."""
    wanted = request(tmp_path)
    work = Work(wanted, wanted.plan())
    (cell, *_) = work.cells()
    data = cell.model.dataset.fingerprint
    run = wanted.output / "runs" / cell.name
    run.mkdir(parents=True)
    (wanted.output / "configs").mkdir()
    save_config(cell.config(wanted.output), wanted.output / "configs" / f"{cell.name}.yaml")
    key, value = change.split("=")
    now = request(tmp_path, overrides=GRID["overrides"] | {key: yaml.safe_load(value)})
    settle(work, cell.name, 2.0, data)
    with pytest.raises(UserError, match=rf"{cell.name} was run with {key}=.*, now {value}.*; set {key}: "):
        Work(now, now.plan()).refuse_other_results()

    settle(work, cell.name, None, data)
    work.refuse_other_results()
    assert work.is_settled(cell)
    again = Work(now, now.plan())
    if key.startswith("checkpoint."):
        with pytest.raises(UserError, match="holds another grid's results"):
            again.refuse_other_results()
        return
    again.refuse_other_results()
    assert not again.is_settled(cell) and run.is_dir()  # until it is trained
    again._remove(cell)
    assert not run.exists() and not again.result(cell)


def test_results_of_other_processes_are_rejected(tmp_path: Path) -> None:
    wanted = request(tmp_path)
    work = Work(wanted, wanted.plan())
    (cell, *_) = work.cells()
    settle(work, cell.name, 2.0, cell.model.dataset.fingerprint)
    start = {"cell": cell.name, "time": 0.0, "alone": True, "device": "cpu", "versions": {}}
    (wanted.output / "starts.jsonl").write_text(json.dumps(start) + "\n")
    work.refuse_other_results()  # an earlier version did not say with how many
    (wanted.output / "starts.jsonl").write_text(json.dumps(start | {"processes": 2}) + "\n")
    with pytest.raises(UserError, match=rf"{cell.name} was run with processes=2, now 1; set processes: 2, give"):
        work.refuse_other_results()


def test_the_hash_of_a_configuration_is_that_of_its_result(tmp_path: Path) -> None:
    (model, *_) = models(tmp_path)
    config = Cell(model, 1, None).config(tmp_path)
    moved = replace(config, run=replace(config.run, name="other", directory="elsewhere"))
    assert config_hash(moved) == config_hash(config) != config_hash(Cell(model, 2, None).config(tmp_path))

    tree = config_to_dict(config) | {"run": {"seed": 1}}  # hashes of grids without such settings stay
    sections = [tree.pop(name) for name in ("checkpoint", "logging", "resilience", "fault_injection")]
    assert config_hash(config) == hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    assert sections[0]["initialize_from"] is None
    save_config(config, tmp_path / "cell.yaml")
    hashes = [config_hash(load_config(tmp_path / "cell.yaml", [change])) for change in DECISIVE]
    assert len({config_hash(config), *hashes}) == 1 + len(DECISIVE)
    for change in ("resilience.hang_timeout=7", "fault_injection.fault=pause", "checkpoint.interval=7"):
        assert config_hash(load_config(tmp_path / "cell.yaml", [change])) == config_hash(config)


def test_a_run_s_metrics_become_a_result(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": s, "tokens": 100 * s, "loss": 3.0, "tokens_per_second": speed, "mfu": 0.1, "peak_memory_gib": s / 10}
        for s, speed in ((1, 1.0), (2, 200.0), (3, 100.0), (4, 50.0))
    ]
    validation = {"step": 4, "tokens": 400, "validation_loss": 2.0, "validation_perplexity": 7.39, "causal": True}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured(tmp_path, 4, 100) is None  # its last step was not validated
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, validation]))
    found = measured(tmp_path, 4, 100)
    assert found is not None and measured(tmp_path, 5, 100) is None
    assert (found["loss"], found["perplexity"], found["causal"]) == (2.0, 7.39, True)
    assert (found["step_seconds"], found["peak_memory_gib"]) == (1.0, 0.4)  # without the first line, which compiles
    assert found["train_seconds"] == pytest.approx(100 + 0.5 + 1 + 2)


# --- reports, from made-up results


def row(member: str, seed: int, loss: float | None, **values: Any) -> Row:
    known: dict[str, Any] = {
        "cell": "-".join(map(str, ("tiny-text", member, seed, *(values.get(key) for key in ("sparsity", "heads"))))),
        "size": "tiny", "corpus": "text", "member": member, "kind": "dense", "sparsity": None, "heads": 9,
        "dense_heads": 9, "heads_given": False, "seed": seed, "learning_rate": 1e-3, "status": "done", "causal": True,
        "equal": "paper_flops", "relative_to": "dense", "budget_share": 1.0, "paper_flops": 54_760_833_024,
        "executed_flops": 10**11, "parameters": 28_000_000, "kv_bytes_8k": 9 * 2**20, "steps": 1500,
        "tokens": 98_304_000, "loss": loss, "perplexity": None if loss is None else math.exp(loss),
        "step_seconds": 0.1, "step_alone": True, "peak_memory_gib": 4.0, "device": "NVIDIA H100",
        "command": f"mosa pretrain out/configs/{member}.yaml", "config_hash": "c" * 64, "dataset": "data/text",
        "dataset_hash": "d" * 64, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return Row(**(known | values))


MOSA = {"kind": "expert_choice", "causal": False, "dense_heads": 4}
SEARCH = {"kind": "threshold", "sparsity": 32.0, "dense_heads": 4, "heads_given": True, "kv_bytes_8k": 4 * 2**20}
MADE_UP = [
    row("dense", 1, 2.00, learning_rate=1e-3),
    row("dense", 1, 1.90, learning_rate=2e-3),
    row("dense", 1, None, learning_rate=4e-3, status="diverged", reason="loss is not finite"),
    row("dense", 2, 1.94, learning_rate=2e-3),
    row("mosa", 1, 1.80, sparsity=32.0, heads=276, **MOSA),
    row("mosa", 1, 1.75, sparsity=64.0, heads=505, step_alone=False, **MOSA),
    row("search", 1, 1.91, heads=12, **SEARCH),  # below the mean of dense, above its seed 1
    row("search", 1, 1.89, heads=16, step_seconds=0.08, paper_flops=40_000_000_000, **SEARCH),
    row("search", 1, 1.85, heads=20, **SEARCH),
    row("late", 1, None, status="missing"),
    row("broken", 1, None, status="failed", reason="exit code 1: out of memory"),
]


def test_models_have_the_chosen_learning_rate_and_compare_common_seeds() -> None:
    (place,) = places(MADE_UP)
    dense, low, *_ = place.models
    assert place.reference is dense
    assert dense.losses == {1: 1.90, 2: 1.94} and len(dense.trials) == 3
    assert (dense.loss, dense.spread) == (pytest.approx(1.92), pytest.approx(0.04))
    assert low.above(dense) == pytest.approx(1.80 - 1.90)  # seed 1 of both
    assert place.noise == pytest.approx(0.04)


def test_what_one_seed_has_is_not_listed_as_empty_even_if_it_is_zero() -> None:
    empty = dict.fromkeys(("leak", "flip_rate", "decode_ms"), "not measured yet")
    rows = [row("mosa", 1, 1.8, flip_rate=0.0), row("mosa", 2, 1.8, not_measured=empty)]
    (place,) = places(rows)
    assert place.models[0].not_measured.keys() == {"leak", "decode_ms"}


def test_a_report_says_what_came_out(tmp_path: Path) -> None:
    write_results(MADE_UP, tmp_path)
    rows = read_results(tmp_path)
    assert rows == MADE_UP
    assert "perplexity" in (tmp_path / "results.csv").read_text().splitlines()[0]
    assert write_report(rows, tmp_path, tmp_path / "report") == ["report.md", "tiny-text.png"]
    assert (tmp_path / "report" / "tiny-text.png").stat().st_size > 10_000
    text = (tmp_path / "report" / "report.md").read_text()
    for part in (
        "| dense | 9 | 100.00 % | 1, 2 | 0.002 | 1.9200 | 0.0400 | 6.82 |  | 28.0 M | 100.0 | 4.00 | 9.00 | yes |",
        "| mosa rho 32 | 4 + 276 | 100.00 % | 1 | 0.001 | 1.8000 |  | 6.05 | -0.1000 (-9.5 % perplexity) |",
        "~100.0",
        "| **NON-CAUSAL** |",
        "differ by up to 0.0400: smaller differences",
        "0.001: 2.0000, 0.002: 1.9000, 0.004: diverged",
        "out of memory",
        "missing",
        "8 of 11 runs are done",
        "means over the seeds that both have, or over all seeds if they have none in common",
        "`mosa pretrain out/configs/mosa.yaml`",
        "NVIDIA H100",
        "data/text (hash dddddddddddd) each",
        "![tiny-text.png](tiny-text.png)",
    ):
        assert part in text, part
    assert "Measured on NVIDIA H100 (step times)." in text and "different devices" not in text
    elsewhere = [replace(MADE_UP[0], step_device="cpu"), *MADE_UP[4:]]
    mixed = markdown(elsewhere, {})
    assert "Trained on NVIDIA H100, with torch 2.13.0. Measured on NVIDIA H100; cpu (step times)." in mixed
    assert "**Measured on different devices: step times cannot be compared between all models.**" in mixed
    assert "at an end of the list" not in text
    named = "mosa rho 32, mosa rho 64, search rho 32, 12 heads, search rho 32, 16 heads, search rho 32, 20 heads"
    assert f"No learning rates were tried for {named}, but for dense they were" in text
    same = [row("mosa", 1, 1.8, sparsity=32.0, heads=276, learning_rate=2e-3, **MOSA)]
    assert "No learning rates were tried" not in markdown(MADE_UP[:4] + same, {})
    at_edge = [row("dense", 1, 2.0), row("dense", 1, 1.9, learning_rate=2e-3)]
    assert "at an end of the list" in markdown(at_edge, {})


def test_a_report_without_matplotlib_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report(MADE_UP, tmp_path, tmp_path / "report") == ["report.md"]
    printed = "report.md has no pictures: pictures need matplotlib, which is not installed (pip install matplotlib)\n"
    assert capsys.readouterr().out == printed
    assert "| dense | 9 |" in (tmp_path / "report" / "report.md").read_text()


def test_losses_over_tokens_and_seconds_are_drawn_from_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"step": s, "tokens": s, "loss": 3 / s, "tokens_per_second": 0.5, "mfu": 0.1} for s in (1, 2)]
    drawn: list[Any] = []
    monkeypatch.setattr(report, "plot", lambda runs, path: drawn.append([curves.training[-1] for curves in runs]))
    for made_up in MADE_UP[4:6]:  # the first was measured alone, the second not
        run = tmp_path / "runs" / made_up.cell
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert "tiny-text-losses.png" in write_report(MADE_UP, tmp_path, tmp_path)
    assert drawn == [[(2, 2, pytest.approx(0.2), 1.5, True)], [(2, 2, 4.0, 1.5, True)] * 2]


def test_the_fewest_heads_that_match_dense() -> None:
    (search,) = matched(MADE_UP)
    assert search.model is not None and search.model.row.heads == 16
    lines = table([search])
    text = "\n".join(lines)
    assert "of 12, 16, 20 heads, 16 are the fewest that match dense." in lines[0]
    assert "| perplexity | 6.69 | 6.62 | -1.0 % |" in text  # exp(1.90) and exp(1.89): of the seed that both have
    for part in ("| step, ms | 100.0 | 80.0 | -20.0 % | 137 to 127 (-7.3 %)", "17 (32)", "54.76 | 40.00 | -27.0 %"):
        assert part in text, part
    assert "9.00 | 4.00 | -55.6 % | 9216 to 4640" in text
    worse = [one if one.member != "search" else replace(one, loss=2.5, perplexity=math.exp(2.5)) for one in MADE_UP]
    assert "none of 12, 16, 20 heads matches dense" in table(matched(worse))[0]
    single = "\n".join(table(matched([*MADE_UP[:4], row("search", 1, 1.89, heads=1, **SEARCH)])))
    assert "of 1 head, 1 is the fewest that matches dense." in single and "| dense | 1 head |" in single
    better = [one if one.member != "search" else replace(one, loss=1.0, causal=False) for one in MADE_UP]
    first = table(matched(better))[0]
    assert "fewer may match, too" in first and "NON-CAUSAL" in first


def test_the_paper_s_flops_beside_ours_follow_from_its_heads() -> None:
    from megatron_mosa.tools.grid.match import _PAPER_HEADS, _PAPER_SIZES, _QUANTITIES

    printed = next(quantity.paper for quantity in _QUANTITIES if "GFLOP" in quantity.name)
    for size, heads, pair in zip(_PAPER_SIZES, _PAPER_HEADS, printed, strict=True):
        number, sparsity = heads.rstrip(")").split(" (")
        dense = CONFIGS / "paper" / f"{size.lower()}.yaml"
        hybrid = load_config(
            dense, ["model.num_dense_heads=4", f"mosa.num_heads={number}", f"mosa.sparsity={sparsity}"]
        )
        found = tuple(round(paper_flops(config) / 1e9, 2) for config in (load_config(dense), hybrid))
        assert found == pair


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_commands(tmp_path: Path) -> None:
    write_results(MADE_UP, tmp_path)
    assert "16 are the fewest" in call("isoflop", "match", str(tmp_path))
    assert "Wrote report.md, tiny-text.png" in call("report", str(tmp_path))
    printed = call("isoflop", "run", str(write(tmp_path)), "--dry-run")
    assert [line.split() for line in printed.splitlines()[1:]] == [
        ["tiny-text-dense", "9", "100.00", "%", "1"],
        ["tiny-text-mosa-rho32", "4", "+", "276", "99.93", "%", "1"],
        ["tiny-text-mosa-rho64", "4", "+", "505", "99.97", "%", "1"],
    ]
    assert "--sparsity" in call("isoflop", "--help") and "GRID.yaml" in call("isoflop", "run", "--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["isoflop", "run", "GRID", "--no-train", "--slurm"], "--no-train evaluates and measures on this machine"),
        (["report", "FOLDER"], r"has no results.jsonl; give the output directory of mosa isoflop run"),
        (["isoflop", "match", "FOLDER"], r"has no results.jsonl"),
        (["isoflop", "run", "FOLDER/none.yaml"], "grid '.*none.yaml' does not exist"),
        (["isoflop", "run", str(TINY)], "is not a grid: it has no members; .*mosa isoflop CONFIG prints"),
        (["isoflop", "run", "GRID", "--jobs", "0"], "--jobs must be at least 1 and at most "),
        (["isoflop", "run", "GRID", "--time-limit", "0"], "--time-limit must be greater than 0 and at most "),
    ],
)
def test_wrong_use(tmp_path: Path, arguments: list[str], message: str) -> None:
    grid = str(write(tmp_path))
    arguments = [one.replace("FOLDER", str(tmp_path)).replace("GRID", grid) for one in arguments]
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_damaged_results(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"cell": "a"}\n')
    with pytest.raises(UserError, match="line 1 is not a result"):
        read_results(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_results(tmp_path)
    write_results(MADE_UP[:1], tmp_path)
    with pytest.raises(UserError, match="has no member whose numbers of heads are given"):
        CliRunner().invoke(app, ["isoflop", "match", str(tmp_path)], catch_exceptions=False)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write_report(MADE_UP, tmp_path, tmp_path / "file" / "below")


def test_a_plan_lists_each_cell_once(tmp_path: Path) -> None:
    found = models(tmp_path, seeds=[1, 2])
    cells, later = Plan(found).all_cells(lambda trials: None)
    assert (len(cells), len({cell.name for cell in cells}), later) == (6, 6, 0)
