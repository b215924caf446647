"""Layouts, cells and predicted memory of a sweep, its directory and sessions, and reports of made-up results."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_mosa.cli import app
from megatron_mosa.config import Config, load_config
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.tools.grid.launch import LocalLauncher
from megatron_mosa.tools.processes import alone_in
from megatron_mosa.tools.scaling import session, sweep, sweep_slurm, sweep_work
from megatron_mosa.tools.scaling.cells import Cell, fp32_reference, plan_cells, reference_cell
from megatron_mosa.tools.scaling.commands import parse_counts
from megatron_mosa.tools.scaling.layouts import SweepLayout, check_layouts, default_layouts, parse_layout, valid_layouts
from megatron_mosa.tools.scaling.memory import Card, card, least_gib
from megatron_mosa.tools.scaling.rows import Row, Sweep, deviation, make_rows
from megatron_mosa.tools.scaling.session import (
    NO_MEMORY,
    NO_TIME,
    Event,
    Session,
    Tail,
    failure,
    is_measured,
    read_result,
    result_path,
    supervise,
    write_result,
)
from megatron_mosa.tools.scaling.sweep import plan
from megatron_mosa.tools.scaling.sweep_checks import refuse_deviations, refuse_unfinished
from megatron_mosa.tools.scaling.sweep_directory import prepare_output, read_sweep
from megatron_mosa.tools.scaling.sweep_plots import bar_of
from megatron_mosa.tools.scaling.sweep_progress import Progress
from megatron_mosa.tools.scaling.sweep_report import markdown, write_report
from megatron_mosa.tools.scaling.sweep_request import Request
from megatron_mosa.tools.scaling.sweep_work import Work
from megatron_mosa.tools.scaling.sweep_worker import reason_of
from tests.unit.test_bench import measurement

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"  # tp 2, sp, zero 1, micro 4, global batch 16


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(QUICKSTART)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp=2,sp=true,zero=1,micro=4", SweepLayout(2, True, 1, 4)),
        (" tp = 1 , sp = False ", SweepLayout(1, False, 1, 4)),
        ("tp=1,sp=true", SweepLayout(1, False, 1, 4)),  # sp has no effect at tp=1
        ("zero=3,micro=2", SweepLayout(2, True, 3, 2)),
        ("tp=1,processes=2,overlap=false", SweepLayout(1, False, 1, 4, processes=2)),
        ("overlap=false", SweepLayout(2, True, 1, 4, overlap=False)),
    ],
)
def test_layouts_are_parsed_and_completed(config: Config, text: str, expected: SweepLayout) -> None:
    layout = parse_layout(text, config)
    assert layout == expected
    assert parse_layout(str(layout), config) == replace(layout, processes=None)
    applied = layout.apply(config)
    assert (applied.parallel.tensor_model_parallel_size, applied.parallel.zero_stage) == (layout.tp, layout.zero)
    assert (applied.parallel.sequence_parallel, applied.train.micro_batch_size) == (layout.sp, layout.micro)
    assert (applied.parallel.tensor_parallel_overlap == "auto") == layout.overlap
    assert config.train.micro_batch_size == 4  # a copy


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tp2", ["'tp2' is not KEY=VALUE", "the keys are tp, sp, zero, micro, overlap and processes"]),
        ("zer=1", ["'zer=1'", "did you mean 'zero'"]),
        ("tp=two", ["tp must be an integer, got two"]),
        ("sp=1", ["sp must be true or false, got 1"]),
        ("tp=1,tp=2", ["tp is given twice"]),
    ],
)
def test_malformed_layouts_are_rejected(config: Config, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_layout(text, config)
    for part in [f"--layout {text}", *parts]:
        assert part in one_line(error)


@pytest.mark.parametrize(
    ("layout", "processes", "parts"),
    [
        (SweepLayout(4, False, 1, 4), 2, ["size=4", "nearest valid layouts: tp=2,sp=false,zero=1,micro=4"]),
        (SweepLayout(2, True, 5, 4), 2, ["zero_stage must be", "nearest valid layouts: tp=2,sp=true,zero=3,micro=4"]),
        (SweepLayout(2, True, 1, 3), 2, ["micro_batch_size=3", "nearest valid layouts: tp=2,sp=true,zero=1,micro=4"]),
        # 16 samples on 2 data-parallel ranks: at most 8 each
        (SweepLayout(1, False, 1, 16), 2, ["= 32", "nearest valid layouts: tp=1,sp=false,zero=1,micro=8"]),
        (SweepLayout(1, False, 1, 0), 2, ["must be at least 1", "nearest valid layouts: tp=1,sp=false,zero=1,micro=1"]),
    ],
)  # fmt: skip
def test_an_invalid_layout_is_reported_with_its_neighbors(
    config: Config, layout: SweepLayout, processes: int, parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        check_layouts(config, [SweepLayout(1, False, 1, 4), layout], processes)
    for part in [f"--layout {layout}", *parts]:
        assert part in one_line(error)
    near = one_line(error).partition("nearest valid layouts: ")[2].split(" | ")
    check_layouts(config, [parse_layout(text, config) for text in near], processes)


def test_a_duplicate_layout_is_rejected(config: Config) -> None:
    with pytest.raises(UserError, match="tp=1,sp=false,zero=1,micro=4 is given twice"):
        check_layouts(config, [parse_layout("tp=1", config), parse_layout("tp=1,sp=true", config)], 2)


def test_default_layouts(config: Config) -> None:
    assert [layout.name for layout in default_layouts(config, 2)] == [
        "tp1-zero0-micro4", "tp1-zero1-micro4", "tp1-zero2-micro4", "tp1-zero3-micro4",
        "tp2-zero1-micro4", "tp2-sp-zero1-micro4",
    ]  # fmt: skip
    bf16 = replace(config, train=replace(config.train, precision="bf16"))
    assert {layout.zero for layout in default_layouts(bf16, 2)} == {1, 2, 3}  # stage 0 does not support bf16
    assert {(layout.tp, layout.micro) for layout in default_layouts(config, 8)} == {
        (1, 2),
        (2, 4),
    }  # 4 x 8 = 32 exceeds the batch
    for processes in (1, 2, 8, 16):
        check_layouts(config, default_layouts(config, processes), processes)
    assert valid_layouts(config, 3) == []
    for rejected in (
        lambda: default_layouts(config, 3),
        lambda: check_layouts(config, [SweepLayout(1, False, 1, 4)], 3),
    ):
        with pytest.raises(UserError, match="; set --processes=2, or train.global_batch_size=15$") as caught:
            rejected()
        assert str(caught.value).count("set ") == 1  # not what would do without --layout and --processes
    check_layouts(config, default_layouts(config, 2), 2)
    fitting = replace(config, train=replace(config.train, global_batch_size=15))
    check_layouts(fitting, default_layouts(fitting, 3), 3)
    fixed = {"num_dense_heads": 0, "num_fixed_heads": 8, "fixed_stride": 4}
    others = replace(config, model=replace(config.model, **fixed), mosa=replace(config.mosa, num_heads=0))
    with pytest.raises(UserError, match=r"heads \(model\.num_fixed_heads=8\), .*; set --processes=8, or train"):
        default_layouts(others, 9)


LAYOUT = SweepLayout(1, False, 1, 4)


def names(cells: list[Cell]) -> list[str]:
    return [f"{cell.layout.name} {cell.processes} {cell.global_batch}" for cell in cells]


def test_layouts_are_measured_on_the_processes_that_they_fit(config: Config) -> None:
    layouts = [parse_layout(text, config) for text in ("tp=1,zero=1", "tp=1,zero=3", "tp=2,sp=true,zero=1")]
    assert names(plan_cells(config, layouts, [1, 2, 4])) == [
        "tp1-zero1-micro4 1 16",  # ZeRO-3 has nothing to partition
        "tp1-zero1-micro4 2 16", "tp1-zero3-micro4 2 16", "tp2-sp-zero1-micro4 2 16",
        "tp1-zero1-micro4 4 16", "tp1-zero3-micro4 4 16", "tp2-sp-zero1-micro4 4 16",
    ]  # fmt: skip
    assert names(plan_cells(config, layouts[:1], [1, 2], weak=8)) == [
        "tp1-zero1-micro4 1 16", "tp1-zero1-micro4 1 8", "tp1-zero1-micro4 2 16",
    ]  # fmt: skip
    pinned = [parse_layout(text, config) for text in ("tp=1,zero=3,processes=1", "tp=2,zero=2,processes=4")]
    assert names(plan_cells(config, pinned, [])) == ["tp1-zero3-micro4 1 16", "tp2-sp-zero2-micro4 4 16"]
    assert names(plan_cells(config, [*layouts[:1], pinned[0]], [2])) == [
        "tp1-zero3-micro4 1 16",
        "tp1-zero1-micro4 2 16",
    ]
    assert {cell.processes for cell in plan_cells(config, [], [1, 2])} == {1, 2}
    for cell in plan_cells(config, layouts, [1, 2, 4], weak=4):
        assert Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell
        applied = cell.apply(config)
        assert applied.train.global_batch_size == cell.global_batch and applied.train.precision == "fp32"


@pytest.mark.parametrize(
    ("layouts", "counts", "weak", "message"),
    [
        (["tp=7"], [1, 2], None, "--layout tp=7,sp=true,zero=1,micro=4 on 2 processes"),
        (["tp=2"], [1, 2], None, "no --layout fits --processes=1; leave that count out, or give a layout for it"),
        (["tp=1", "tp=1,sp=true"], [1, 2], None, "is given twice"),
        (["tp=1"], [1, 2], 3, "--weak=3: no layout fits 3 samples on each of 1 processes: .* must be divisible by"),
        (["tp=2,processes=3"], [2], None, "on 3 processes: world size 3 is not divisible"),
    ],
)
def test_layouts_that_fit_no_processes_are_rejected(
    config: Config, layouts: list[str], counts: list[int], weak: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_cells(config, [parse_layout(text, config) for text in layouts], counts, weak)


def test_the_reference_is_one_process_in_the_precision_of_training(config: Config) -> None:
    bf16 = replace(config, train=replace(config.train, precision="bf16"))
    four = Cell(SweepLayout(4, False, 1, 2), 4, 16)
    alone = Cell(SweepLayout(1, False, 1, 2), 1, 16)
    assert reference_cell(bf16, [four]) == Cell(SweepLayout(1, False, 1, 4), 1, 16)
    assert reference_cell(bf16, [four, alone]) == alone
    assert reference_cell(bf16, [four, replace(alone, global_batch=8)]).global_batch == 16
    assert reference_cell(config, [four]).layout.zero == 0
    reference = fp32_reference(bf16, [four, alone])
    train = reference.apply(bf16).train
    assert (train.precision, train.deterministic, train.micro_batch_size) == ("fp32", True, 2)
    assert alone.apply(bf16).train.precision == "bf16"


def test_the_memory_that_a_layout_needs_at_least() -> None:
    config = load_config(QUICKSTART.with_name("scale") / "1b_mosa.yaml")
    vocab_size = config.data.vocab_size

    def gib(layout: str, processes: int) -> float:
        cell = Cell(parse_layout(layout, config), processes, 256)
        return least_gib(cell.apply(config), vocab_size, processes)

    # 1.29 B parameters: 18 bytes each, of which ZeRO-1 divides 12, ZeRO-2 16 and ZeRO-3 all among 4 ranks.
    parameters = 1.29e9 / 2**30
    one = gib("tp=1,zero=1", 1)
    activations = one - 18 * parameters
    assert 36.5 > one > 25 and 4 < activations < 15  # 36.5 GiB were reserved in a run of this
    assert one - gib("tp=1,zero=1", 4) == pytest.approx(9 * parameters, rel=0.01)
    assert one - gib("tp=1,zero=2", 4) == pytest.approx(12 * parameters, rel=0.01)
    assert one - gib("tp=1,zero=3", 4) == pytest.approx(13.5 * parameters, rel=0.01)
    assert gib("tp=4,sp=true,zero=1", 4) == pytest.approx(one / 4, rel=0.01)
    assert one > gib("tp=1,zero=1,micro=1", 1) > 18 * parameters


def request(config: Config, cells: list[Cell], output: Path, **changes: Any) -> Request:
    return replace(Request(config, cells, 1, 3, output, "mosa sweep x.yaml", "cpu"), **changes)


def test_what_cannot_fit_is_not_run(config: Config, tmp_path: Path) -> None:
    big = replace(config, model=replace(config.model, num_layers=32, hidden_size=4096, ffn_hidden_size=16384))
    cells = [Cell(SweepLayout(2, True, 1, 4), count, 16) for count in (2, 4)] + [
        Cell(SweepLayout(1, False, 3, 4), 4, 16)
    ]
    here = Card("NVIDIA H100", 30.0)
    work = Work(request(big, cells, tmp_path, device="cuda"), big, 2048, here)
    assert work.cells == cells  # one process is not among them, as it would not fit
    assert list(work.too_large) == cells[:1] and work.missing == cells[1:]
    row = next(row for row in work.rows() if row.cell == cells[0])
    assert row.status == "too large" and row.reason.startswith("needs at least ") and "which has 30" in row.reason
    with pytest.raises(
        UserError, match="no layout fits the memory: .* needs at least .* GiB on each rank, which has 4"
    ):
        Work(request(big, cells, tmp_path, device="cuda", memory_gib=4.0), big, 2048, here)
    assert not Work(request(big, cells, tmp_path, device="cuda"), big, 2048, None).too_large  # an unknown card


def result(losses: list[float], norms: list[float], milliseconds: list[float], **changes: Any) -> dict[str, Any]:
    profile = {"busy": 1.0, "wall": 8.0, "communicating": 2.0, "exposed": 1.0, "kinds": {}}
    found = measurement(
        losses=losses, grad_norms=norms, milliseconds=milliseconds, tokens_per_step=4096, device="cpu",
        communication_share=0.25, profile=profile, allocated_gib=0.5, reserved_gib=0.0, **changes,
    )  # fmt: skip
    return json.loads(json.dumps(asdict(found))) | {"wall_seconds": 20.0}


RESULT = result([8.0, 6.0, 4.0], [1.0, 2.0, 4.0], [2000.0, 9000.0, 4000.0])
ALONE = Cell(SweepLayout(1, False, 0, 4), 1, 16)
OTHER, BROKEN = Cell(SweepLayout(2, True, 1, 4), 2, 16), Cell(SweepLayout(1, False, 3, 8), 2, 16)


def hand_made(config: Config, device: str = "cpu") -> Sweep:
    """The reference, a layout that deviates by 0.5 in a loss of 4 and by 0.1 in a norm of 2, and one that failed."""
    other = result([8.0, 6.0, 4.5], [1.0, 1.9, 4.0], [1000.0, 2000.0, 100000.0])
    results = [(OTHER, other), (BROKEN, {"reason": "OutOfMemoryError: 3|4"}), (ALONE, RESULT)]
    rows = make_rows(results, 16, None, ALONE)
    return Sweep("quickstart", 256, 16, None, "fp32", rows, device, "mosa sweep x.yaml", {"torch": "9.9"})


def test_the_tables(config: Config, tmp_path: Path) -> None:
    files = write_report(hand_made(config), tmp_path)
    assert files == ["results.md", "results.csv", "scaling.png", "breakdown.png"]
    text = (tmp_path / "results.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[2:5] == [
        "| reference: tp=1,sp=false,zero=0,micro=4 | 1 | 16 | 1,024 | 100 % |  | 4 | 0.50 | 25 % | 0.0e+00 | 0.0e+00 |",
        "| tp=2,sp=true,zero=1,micro=4 | 2 | 16 | 1,024 | 100 % |  | 2 | 0.50 | 25 % | 1.2e-01 | 5.0e-02 |",
        "| tp=1,sp=false,zero=3,micro=8 | 2 | 16 | failed: OutOfMemoryError: 3\\|4 |  |  |  |  |  |  |  |",
    ]
    assert table[5:] == [
        "| layout | ranks | batch | computation | collectives | step |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| tp=1,sp=false,zero=0,micro=4 | 1 | 16 | 3,000.0 | 1,000.0 | 4,000.0 |",
        "| tp=2,sp=true,zero=1,micro=4 | 2 | 16 | 1,500.0 | 500.0 | 2,000.0 |",
    ]
    assert "functional, not performance: ranks share" in text
    assert "torch 9.9" in text and "    mosa sweep x.yaml" in text
    with (tmp_path / "results.csv").open() as file:
        reference, other, failed = csv.DictReader(file)
    assert (reference["status"], other["status"], failed["status"]) == ("reference", "ok", "failed")
    assert float(other["tokens_per_second_per_rank"]) == 4096 / 2 / 2  # median 2 s, two ranks
    assert (float(other["loss_deviation"]), float(other["ms_collectives"])) == (0.125, 500.0)
    assert failed["reason"] == "OutOfMemoryError: 3|4" and failed["loss_deviation"] == ""
    assert all(row["note"] == "functional, not performance" for row in (reference, other, failed))
    for name in ("scaling.png", "breakdown.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_gpu_numbers_have_no_note(config: Config) -> None:
    sweep = hand_made(config, "cuda")
    on_gpu = {"device": "H100", "mfu": 0.38, "reserved_memory_gib": 0.75}
    text = markdown(replace(sweep, rows=[replace(row, **on_gpu) for row in sweep.rows]))
    assert "functional" not in text and "1 and 2 x H100 (nccl)" in text and "| 38 % | 4 | 0.50 | 0.75 |" in text


def test_efficiency_is_against_the_fastest_layout_on_the_fewest_processes() -> None:
    def cell(tp: int, processes: int, batch: int) -> Cell:
        return Cell(SweepLayout(tp, False, 1, 4), processes, batch)

    def speed(tokens_per_rank: float, cell: Cell) -> tuple[Cell, dict[str, Any]]:
        return cell, RESULT | {"milliseconds": [4096e3 / tokens_per_rank / cell.processes]}

    cells = [cell(1, 2, 32), cell(2, 2, 32), cell(1, 4, 32), cell(1, 2, 16), cell(1, 1, 8)]
    results = [speed(tokens, cell) for tokens, cell in zip([400.0, 500.0, 300.0, 350.0, 700.0], cells, strict=True)]
    fp32 = replace(cells[0], processes=1, fp32=True)  # is no baseline
    rows = {row.cell: row for row in make_rows([*results, speed(9000.0, fp32)], 32, 8, None)}
    strong = [rows[one].strong_efficiency for one in cells]
    assert strong == [pytest.approx(0.8), 1.0, pytest.approx(0.6), None, None]
    weak = [rows[one].weak_efficiency for one in cells]
    assert weak == [None, None, pytest.approx(3 / 7), pytest.approx(0.5), 1.0]
    assert rows[fp32].strong_efficiency is None
    assert [rows[one].status for one in cells] == ["reference", "ok", "ok", "ok", "ok"]
    assert rows[cells[3]].loss_deviation is None  # nothing else was measured on its data


def test_a_bar_is_as_long_as_the_step_also_where_kernels_overlap() -> None:
    row = Row(
        "", 1, 1, False, 1, 4, 16, "ok", tokens_per_second_per_rank=1000.0, step_seconds=0.1,
        exposed_communication_share=0.2,
        kinds={"MoSA": 30.0, "matrix products": 90.0, "collectives": 50.0, "idle": 20.0},
    )  # fmt: skip
    parts = bar_of(row)  # of 100 tokens
    assert parts == pytest.approx({"MoSA": 150.0, "matrix products": 450.0, "collectives": 200.0, "idle": 200.0})
    slowed = bar_of(replace(row, kinds=row.kinds | {"matrix products": 20.0}))  # by the profiler, between kernels
    assert sum(slowed.values()) == pytest.approx(1000.0)


def test_another_cell_takes_the_place_of_a_reference_that_failed() -> None:
    two, four = replace(OTHER, processes=2), replace(OTHER, processes=4)
    rows = make_rows([(ALONE, {"reason": "OutOfMemoryError"}), (four, RESULT), (two, RESULT)], 16, None, ALONE)
    assert [(row.processes, row.status) for row in rows] == [(2, "reference"), (1, "failed"), (4, "ok")]
    assert rows[2].loss_deviation == 0.0


def test_deviations_beyond_the_tolerance_are_errors(config: Config) -> None:
    assert deviation([1.0, -2.2], [1.0, -2.0]) == pytest.approx(0.1)
    sweep = hand_made(config)
    message = r"more than 0.001 \(fp32\): tp=2,sp=true,zero=1,micro=4 on 2 processes \(1.2e-01\)$"
    with pytest.raises(RunError, match=message):
        refuse_deviations(sweep)
    close = replace(sweep, rows=[replace(row, loss_deviation=0.01) for row in sweep.rows])
    refuse_deviations(replace(close, precision="bf16"))
    with pytest.raises(RunError):
        refuse_deviations(close)
    steep = replace(sweep, rows=[replace(row, loss_deviation=1e-4, grad_norm_deviation=0.067) for row in sweep.rows])
    with pytest.raises(RunError, match="gradient norms deviate from the reference by more than 0.01"):
        refuse_deviations(steep)


def test_what_was_not_measured_is_an_error(config: Config) -> None:
    sweep = hand_made(config)
    refuse_unfinished(sweep)  # a failure is a result
    missing = make_rows(
        [(ALONE, RESULT), (OTHER, {"status": "missing", "reason": "not measured yet"})], 16, None, ALONE
    )
    with pytest.raises(
        RunError, match="not measured: tp=2,sp=true,zero=1,micro=4 on 2 processes; run the same command"
    ):
        refuse_unfinished(replace(sweep, rows=missing))
    with pytest.raises(RunError, match="no layout could be measured; .* failed: OutOfMemoryError"):
        refuse_unfinished(replace(sweep, rows=[row for row in sweep.rows if row.status == "failed"]))


def test_another_cards_sweep_is_put_beside(config: Config, tmp_path: Path) -> None:
    settings = request(config, [ALONE, OTHER], tmp_path / "ours", device="cuda")
    identity = settings.identity({"fingerprint": "x"})
    prepare_output(tmp_path / "theirs", identity | {"versions": {"torch": "1.2"}}, force=False)
    theirs = result([8.0], [1.0], [8000.0], layout="") | {"device": "NVIDIA A100"}
    write_result(tmp_path / "theirs", OTHER, theirs)
    other = read_sweep(tmp_path / "theirs", settings, identity)
    sweep = hand_made(config, "cuda")
    sweep = replace(sweep, rows=[replace(row, device="NVIDIA H100") for row in sweep.rows])
    beside = replace(sweep, beside=((Path("theirs"), other),))
    text = markdown(beside)
    assert "Beside NVIDIA A100 (theirs; torch 1.2):" in text
    assert text.splitlines()[-1] == "| tp=2,sp=true,zero=1,micro=4 | 2 | 16 | 1,024 | 256 | 4.00 | 100 % | 100 % |"
    write_report(beside, tmp_path)
    with pytest.raises(UserError, match="--beside=.* measured something else: --steps=3, now 4"):
        read_sweep(tmp_path / "theirs", settings, replace(settings, steps=4).identity({"fingerprint": "x"}))
    with pytest.raises(UserError, match="--beside=.*none does not hold a sweep"):
        read_sweep(tmp_path / "none", settings, identity)


def test_results_of_two_cards_are_not_mixed(config: Config, tmp_path: Path) -> None:
    settings = request(config, [ALONE, OTHER], tmp_path, device="cuda")
    prepare_output(tmp_path, settings.identity({}), force=False)
    write_result(tmp_path, OTHER, RESULT | {"device": "NVIDIA A100"})
    work = Work(settings, config, 2048, None)
    work.refuse_other_cards(Card("NVIDIA A100", 80.0))
    with pytest.raises(
        UserError, match="holds results of NVIDIA A100, this is NVIDIA H100; give another --output, and"
    ):
        work.refuse_other_cards(Card("NVIDIA H100", 80.0))
    # Jobs that began at the same time may have found different cards.
    write_result(tmp_path, ALONE, RESULT | {"device": "NVIDIA H100", "milliseconds": [1000.0]})
    rows = Work(settings, config, 2048, None).rows()
    assert [row.strong_efficiency for row in rows] == [1.0, 1.0]
    text = markdown(replace(hand_made(config, "cuda"), rows=rows))
    assert "Measured on cards of several kinds" in text and "micro=4 (NVIDIA A100) | 2 |" in text


def test_a_second_sweep_in_the_same_directory_is_rejected(tmp_path: Path) -> None:
    with alone_in(tmp_path / "out", "mosa sweep"):
        with (
            pytest.raises(UserError, match="another mosa sweep is running in --output="),
            alone_in(tmp_path / "out", "mosa sweep"),
        ):
            pass
        with alone_in(tmp_path / "other", "mosa sweep"):
            pass
    with alone_in(tmp_path / "out", "mosa sweep"):
        pass


def test_the_output_directory(tmp_path: Path) -> None:
    folder, identity = tmp_path / "out", {"request": {"steps": 6}, "model": {"num_layers": 2}}
    prepare_output(folder, identity, force=False)
    (folder / "layouts" / "x.json").write_text("{}")
    prepare_output(folder, identity, force=False)  # the same sweep continues
    with pytest.raises(UserError, match="--steps=6, now 7"):
        prepare_output(folder, identity | {"request": {"steps": 7}}, force=False)
    with pytest.raises(UserError, match="model.num_layers=2, now 4"):
        prepare_output(folder, identity | {"model": {"num_layers": 4}}, force=False)
    assert (folder / "layouts" / "x.json").exists()
    (folder / "mine.txt").write_text("mine")
    prepare_output(folder, identity | {"model": {"num_layers": 4}}, force=True)
    assert not (folder / "layouts" / "x.json").exists() and (folder / "mine.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and does not hold a sweep"):
        prepare_output(other, identity, force=False)
    with pytest.raises(UserError, match="is a file"):
        prepare_output(other / "mine.txt", identity, force=False)


def test_force_removes_only_what_a_sweep_wrote(tmp_path: Path) -> None:
    identity = {"request": {"steps": 6}, "model": {"num_layers": 2}}
    for name in ("logs/rank-0.log", "jobs/job.sbatch", "results.csv", "request.json", "mine.txt"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text('{"request": "of something else"}')
        if name != "mine.txt":
            with pytest.raises(UserError, match=f"(holds|its) {name.partition('/')[0]}"):
                prepare_output(folder, identity, force=True)
        for _ in range(2 * (name == "mine.txt")):  # the second call removes what the first one wrote
            prepare_output(folder, identity, force=True)
        assert (folder / name).read_text() == '{"request": "of something else"}'


@pytest.mark.parametrize("nvidia_smi", ["NVIDIA H100 80GB HBM3, 81559\\nNVIDIA H100 80GB HBM3, 81559", None])
def test_the_card_of_this_machine(nvidia_smi: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if nvidia_smi is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{nvidia_smi}\\n'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert card() == (Card("NVIDIA H100 80GB HBM3", 81559 / 1024) if nvidia_smi else None)


# A stand-in for the worker processes: for each cell it does what the cell's micro-batch says.
WORKER = """
import json, os, sys, time
session = json.load(open(sys.argv[1]))
progress = open(sys.argv[1].replace(".json", ".progress"), "a", buffering=1)
for cell in session["cells"]:
    name, what = cell["name"], cell["micro"]
    tell = lambda phase: progress.write(json.dumps({"cell": name, "phase": phase, "step": 0, "of": 0}) + "\\n")
    if what in (7, 8) and os.path.exists("left"):
        tell(NO_MEMORY if what == 7 else NO_TIME)
        os.remove("left")
        sys.exit(0)
    tell("building")
    ended = {"cell": {key: cell[key] for key in ("layout", "processes", "global_batch")}, "finished": time.time()}
    if what == 2:
        open(sys.argv[1].replace(".json", ".error.rank0"), "w").write("OutOfMemoryError: no room")
        sys.exit(1)
    if what == 3:
        time.sleep(600)
    if what == 9:
        open(f"layouts/{name}.json", "w").write(json.dumps(ended))
        tell("done")
        sys.exit(1)
    open(f"layouts/{name}.json", "w").write(json.dumps(ended | {"pid": os.getpid()}))
    tell("done")
"""


def stand_in(folder: Path, micros: list[int], deadline: float | None = None) -> tuple[Session, list[Event]]:
    """Supervise a session of one cell for each micro-batch size; return it and its events."""
    for name in ("jobs", "layouts", "logs"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "left").touch()
    trees = [Cell(replace(LAYOUT, micro=micro), 2, 16).to_dict() for micro in micros]
    two = Session("two", str(folder), {}, trees, 2, 1, 3, False, False, deadline)
    events: list[Event] = []

    def launch(file: Path, processes: int, log: Path, number: int) -> subprocess.Popen[bytes]:
        content = json.loads(file.read_text())
        for tree in content["cells"]:
            tree |= {"name": Cell.from_dict(tree).name, "micro": tree["layout"]["micro"]}
        file.write_text(json.dumps(content))
        code = WORKER.replace("NO_MEMORY", repr(NO_MEMORY)).replace("NO_TIME", repr(NO_TIME))
        return subprocess.Popen([sys.executable, "-IS", "-c", code, str(file)], cwd=folder)

    supervise(two, launch, events.append)
    return two, events


def outcome(folder: Path, micro: int) -> dict[str, Any] | None:
    return read_result(folder, Cell(replace(LAYOUT, micro=micro), 2, 16).name)


def test_processes_are_reused_and_a_failure_costs_only_its_own_cell(tmp_path: Path) -> None:
    events = stand_in(tmp_path, [1, 4, 2, 5, 6])[1]
    found = {micro: outcome(tmp_path, micro) or {} for micro in (1, 2, 4, 5, 6)}
    assert found[2]["reason"] == "OutOfMemoryError: no room; see logs/two-1.log"
    assert found[1]["pid"] == found[4]["pid"] != found[5]["pid"] == found[6]["pid"]
    phases = [event.phase for event in events]
    assert phases.count("starting 2 processes") == 2 and phases.count("done") == 4 and phases.count("failed") == 1
    # What failed is measured again by the next call, and what was measured is never removed by one.
    write_result(tmp_path, Cell(replace(LAYOUT, micro=2), 2, 16), RESULT)
    assert is_measured(tmp_path, Cell(replace(LAYOUT, micro=2), 2, 16).name)


def test_processes_that_leave_memory_allocated_are_replaced(tmp_path: Path) -> None:
    stand_in(tmp_path, [1, 7, 4])
    first, second, third = (outcome(tmp_path, micro) or {} for micro in (1, 7, 4))
    assert first["pid"] != second["pid"] == third["pid"]


def test_processes_that_fail_after_a_result_are_not_the_failure_of_the_next_cell(tmp_path: Path) -> None:
    stand_in(tmp_path, [1, 9, 4])
    assert "reason" not in (outcome(tmp_path, 9) or {"reason": ""}) and "pid" in (outcome(tmp_path, 4) or {})


def test_processes_that_hang_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "STALL_SECONDS", 6.0)
    stand_in(tmp_path, [1, 3, 4])
    assert (outcome(tmp_path, 3) or {})["reason"] == "no progress for 0 minutes; see logs/two-1.log"
    assert "pid" in (outcome(tmp_path, 4) or {})


def test_a_session_without_time_ends_and_keeps_what_it_has(tmp_path: Path) -> None:
    stand_in(tmp_path, [1, 8, 4])
    assert outcome(tmp_path, 1) and outcome(tmp_path, 8) is None and outcome(tmp_path, 4) is None
    started = time.time()
    stand_in(tmp_path, [5, 3, 6], deadline=started + 6.0)
    assert outcome(tmp_path, 5) and outcome(tmp_path, 3) is None and outcome(tmp_path, 6) is None
    assert time.time() - started < 30


def test_a_session_that_cannot_start_is_the_failure_of_all_its_cells(tmp_path: Path) -> None:
    for name in ("jobs", "layouts", "logs"):
        (tmp_path / name).mkdir()
    cells = [ALONE, OTHER]
    broken = Session("x", str(tmp_path), {}, [cell.to_dict() for cell in cells], 2, 1, 3, False, False)
    starts = []

    def launch(file: Path, processes: int, log: Path, number: int) -> subprocess.Popen[bytes]:
        starts.append(number)
        return subprocess.Popen([sys.executable, "-IS", "-c", "raise SystemExit(7)"])

    supervise(broken, launch, lambda event: None)
    assert starts == [1]
    assert {(read_result(tmp_path, cell.name) or {})["reason"] for cell in cells} == {"exit code 7; see logs/x-1.log"}


def test_a_signal_that_was_lost_while_a_session_was_started_stops_the_sweep(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def launch(*_: object) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"]))
        return started[0]

    @contextmanager
    def signals() -> Iterator[Callable[[], None]]:
        def check() -> None:
            if started:
                raise KeyboardInterrupt

        yield check

    monkeypatch.setattr(session.LocalLaunch, "__call__", launch)
    monkeypatch.setattr(sweep, "signals_as_interrupt", signals)
    begin = time.monotonic()
    with pytest.raises(RunError, match="stopped; run the same command again to measure what is missing"):
        sweep.run_sweep(request(config, [ALONE], tmp_path / "sweep", random_tokens=True))
    assert started[0].poll() is not None and time.monotonic() - begin < 30


def test_threads_are_for_the_processors_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """In grids and sweeps; a Slurm job or taskset leaves fewer than the machine has."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    environment = LocalLauncher("cpu", 2, 1, ()).command(["pretrain"], "", 1)[1]
    threads: list[int] = []
    monkeypatch.setattr(sweep, "LocalLaunch", threads.append)
    sweep._run_here([Session("two", "", {}, [], 2, 1, 1, True, False)])
    assert (environment["OMP_NUM_THREADS"], threads) == ("2", [2])


def test_events_are_read_once_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.progress"
    tail = Tail(file)
    assert tail.events() == []
    line = json.dumps(asdict(Event("a", "measuring", 1, 3))) + "\n"
    file.write_text(line + line[:9])
    assert tail.events() == [Event("a", "measuring", 1, 3)]
    assert tail.events() == []
    with file.open("a") as more:
        more.write(line[9:])
    assert tail.events() == [Event("a", "measuring", 1, 3)]


def test_the_reason_of_a_failed_run(tmp_path: Path) -> None:
    log, errors = tmp_path / "x.log", tmp_path / "x.error"
    see = f"; see {tmp_path.name}/x.log"
    assert failure(errors, log, 7) == f"exit code 7{see}"
    (tmp_path / "x.error.rank1").write_text("OutOfMemoryError: no room")
    assert failure(errors, log, 1) == f"OutOfMemoryError: no room{see}"
    log.write_text("Signal 9 (SIGKILL) received by PID 1\nRoot Cause (first observed failure):\n Signal 6 (SIGABRT) re")
    assert failure(errors, log, 1) == f"OutOfMemoryError: no room{see}"
    log.write_text("Root Cause (first observed failure):\n traceback : Signal 9 (SIGKILL) received by PID 3")
    assert "SIGKILL, often for lack of memory" in failure(errors, log, 1)
    (tmp_path / "x.error.rank1").write_text("RuntimeError: Read error [127.0.0.1]:21921: Connection reset by peer")
    log.write_text(
        "exitcode: -9\n Signal 9 (SIGKILL) received by PID 3\nRoot Cause (first observed failure): exitcode 1"
    )
    assert "SIGKILL, often for lack of memory" in failure(errors, log, 1)
    log.write_text("srun: error: n1: task 1: Killed\nsrun: Terminating StepId=7.0\n")
    assert "SIGKILL, often for lack of memory" in failure(errors, log, 137)


def raised(text: str, cause: Exception | None = None) -> Exception:
    try:
        raise RuntimeError(text) from cause
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (raised("CUDA out of memory. Tried\n  to allocate"), "RuntimeError: CUDA out of memory. Tried"),
        (raised("\nbackend='inductor' raised:\nno  kernel\n"), "RuntimeError: no kernel"),
        (raised("no graph", ValueError("limit (8)\nsee")), "RuntimeError: no graph, caused by ValueError: limit (8)"),
        (raised("x" * 900), f"RuntimeError: {'x' * 250}"),
        (ValueError(), "ValueError"),
    ],
)  # fmt: skip
def test_the_reason_of_an_error_is_one_useful_line(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_an_error_without_a_text_is_found_by_its_line() -> None:
    assert re.fullmatch(r"RuntimeError in test_sweep.py, line \d+", reason_of(raised("")))


def test_jobs_measure_elsewhere_where_this_machines_memory_says_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "card", lambda: Card("a small card of the login node", 0.001))
    monkeypatch.setattr(sweep_work, "host_gib", lambda: 0.001)
    for device in ("cuda", "cpu"):
        settings = request(config, [OTHER], tmp_path, device=device)
        with pytest.raises(UserError, match="no layout fits the memory"):
            plan(settings)
        assert all(not objection for _, _, objection in plan(replace(settings, elsewhere=True)))
        with pytest.raises(UserError, match="no layout fits the memory"):
            plan(replace(settings, elsewhere=True, memory_gib=0.001))


def test_failures_in_jobs_are_shown_while_waiting(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = request(config, [OTHER, BROKEN], tmp_path, elsewhere=True, session_per_cell=False)
    prepare_output(tmp_path, settings.identity({}), force=False)
    write_result(tmp_path, BROKEN, {"reason": "of an earlier call"})
    work = Work(settings, config, 2048, None)
    two = next(session for session in work.sessions() if session.processes == 2)
    run = sweep_slurm.SlurmRun(tmp_path, 0)
    answers = iter([{"7"}, {"7"}, set[str]()])

    def jobs(wanted: list[str]) -> set[str]:
        left = next(answers)
        if len(left) == 1 and not is_measured(tmp_path, OTHER.name):
            write_result(tmp_path, OTHER, RESULT)
            two.progress.write_text(json.dumps(asdict(Event(OTHER.name, "done"))) + "\n")
        elif left:
            write_result(tmp_path, BROKEN, {"reason": "OutOfMemoryError: no room"})
        return left

    monkeypatch.setattr(sweep_slurm, "running_jobs", jobs)
    monkeypatch.setattr(sweep_slurm, "_POLL_SECONDS", 0.0)
    run._wait({"7": two}, Progress(work).watch)
    printed = capsys.readouterr().out
    assert "of an earlier call" not in printed
    assert printed.count(f"{OTHER}: ") == 1 and printed.count(f"{BROKEN}: failed: OutOfMemoryError: no room") == 1


def test_a_job_that_measures_nothing_is_an_error_also_after_an_earlier_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("jobs", "layouts", "logs"):
        (tmp_path / name).mkdir()
    write_result(tmp_path, ALONE, {"reason": "of an earlier call"})
    answer = lambda *command: subprocess.CompletedProcess(command, 0, "7\n" if command[0] == "sbatch" else "", "")  # noqa: E731
    monkeypatch.setattr(sweep_slurm, "call_slurm", answer)
    monkeypatch.setattr(sweep_slurm, "_POLL_SECONDS", 0.0)
    one = Session("one", str(tmp_path), {}, [ALONE.to_dict()], 1, 1, 1, True, False)
    with pytest.raises(RunError, match=r"job 7 \(logs/slurm-7.out\) ended before all its layouts were measured"):
        sweep_slurm.SlurmRun(tmp_path, 0)([one], lambda event: None)


def test_a_job_is_submitted_from_paths_with_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my sweep"
    for name in ("jobs", "logs"):
        (folder / name).mkdir(parents=True)
    monkeypatch.chdir(folder)
    calls = []

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, "7;cluster\n", "")

    monkeypatch.setattr(sweep_slurm, "call_slurm", call)
    run, jobs = sweep_slurm.SlurmRun(folder, 4, ("--comment=a b",)), dict[str, Session]()
    one = Session("one", str(folder), {}, [ALONE.to_dict()], 8, 1, 1, True, False)
    run._submit(one, run.sbatch(one), jobs)
    assert list(jobs) == ["7"]
    assert set(calls[0]) > {"sbatch", "--nodes=2", "--gpus-per-node=4", f"--chdir={folder}", "--comment=a b"}
    assert f"--output={folder}/logs/slurm-%j.out" in calls[0] and calls[0][-1] == f"{folder}/jobs/one.sbatch"
    script = (folder / "jobs" / "one.sbatch").read_text()
    assert f"set -- '{folder}/jobs/one.json'\n" in script and "#SBATCH" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_results_of_earlier_versions_have_the_overlap_they_were_measured_with(config: Config, tmp_path: Path) -> None:
    prepare_output(tmp_path, request(config, [], tmp_path).identity({}), force=False)
    new = Cell(SweepLayout(2, True, 1, 4), 2, 16)
    layout = {"tp": 2, "sp": True, "zero": 1, "micro": 4}
    tree = {"layout": layout, "processes": 2, "global_batch": 16, "fp32": False}
    for earlier in (tree, tree | {"layout": layout | {"overlap": False}}):
        assert Cell.from_dict(earlier) == replace(new, layout=replace(new.layout, overlap=False))
    assert Cell.from_dict(tree | {"layout": layout | {"tp": 1, "sp": False, "overlap": False}}).layout.overlap
    # Its file has the name of what now overlaps: that is measured anew.
    file = tmp_path / "layouts" / f"{new.name}.json"
    file.write_text(json.dumps({"cell": tree, "finished": 1.0, **RESULT}))
    work = Work(request(config, [new], tmp_path), config, 2048, None)
    assert new in work.missing and [row.is_measured for row in work.rows()] == [False, False]
    # Beside another sweep, each is compared with its like.
    both = [new, replace(new, layout=replace(new.layout, overlap=False)), ALONE]
    rows = make_rows([(cell, RESULT) for cell in both], 16, None, ALONE)
    theirs = make_rows([(Cell.from_dict(tree), RESULT)], 16, None, None)
    ours = replace(hand_made(config), rows=rows)
    other = replace(ours, rows=theirs)
    text = markdown(replace(ours, beside=((Path("theirs"), other),)))
    compared = text[text.index("Beside") :].splitlines()[4:]
    assert [line.split(" | ")[0] for line in compared] == ["| tp=2,sp=true,zero=1,micro=4,overlap=false"]
    write_report(replace(ours, beside=((Path("theirs"), other),)), tmp_path)


def test_the_results_of_running_jobs_are_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    for job in (7, 8):
        (tmp_path / "jobs" / f"{job}.job").write_text(f"{job}\n")
    queue: Callable[..., Any] = lambda *command: subprocess.CompletedProcess(command, 0, "8\n", "")  # noqa: E731
    monkeypatch.setattr(sweep_slurm, "call_slurm", queue)
    with pytest.raises(UserError, match="whose jobs have not ended: 8; end them first with scancel 8"):
        sweep_slurm.refuse_running_jobs(tmp_path)
    monkeypatch.setattr(sweep_slurm, "call_slurm", lambda *command: subprocess.CompletedProcess(command, 0, "", ""))
    sweep_slurm.refuse_running_jobs(tmp_path)


SINFO = "main*|(null)\ngpu|gpu:h100:4(S:0-1)\nbig|gpu:8,shard:2\nmixed|(null)\nmixed|gpu:2\n"


def test_a_requeued_job_keeps_what_is_measured(tmp_path: Path) -> None:
    """And who reads its progress begins anew with the new file."""
    folder = tmp_path / "sweep"
    for name in ("jobs", "layouts", "logs"):
        (folder / name).mkdir(parents=True)
    cell = Cell(SweepLayout(1, False, 1, 2), 1, 4)
    one = Session("one", str(folder), {}, [cell.to_dict()], 1, 1, 1, True, False)
    write_result(folder, cell, {"milliseconds": [1.0]})
    supervise(one, lambda *arguments: pytest.fail("nothing is left to start"), lambda event: None)
    assert is_measured(folder, cell.name)

    tail = Tail(one.progress)
    one.progress.write_text('{"cell": "a", "phase": "building, for the first time"}\n')
    assert [event.cell for event in tail.events()] == ["a"]
    one.progress.write_text('{"cell": "b", "phase": "building"}\n')
    assert [event.cell for event in tail.events()] == ["b"]


@pytest.mark.parametrize(
    ("partition", "gpus", "message"),
    [
        ("gpu", 4, None),
        ("mixed", 2, None),
        ("gpu,big", 4, None),
        ("gpu,mixed", 4, "partition mixed has at most 2 GPUs per node"),
        (
            None,
            4,
            "partition main has no GPUs, but --gpus-per-node=4; give --partition=big or gpu, or --gpus-per-node 0",
        ),
        ("gpu", 8, "partition gpu has at most 4 GPUs per node, but --gpus-per-node=8; give --partition=big, or"),
        ("none", 1, "--partition=none does not exist; this cluster has big, gpu, main, mixed"),
    ],
)
def test_a_partition_without_gpus_is_rejected(
    partition: str | None, gpus: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer: Callable[..., Any] = lambda *command: subprocess.CompletedProcess(command, 0, SINFO, "")  # noqa: E731
    monkeypatch.setattr(sweep_slurm, "call_slurm", answer)
    if message is None:
        sweep_slurm.check_partition(partition, gpus)
        return
    with pytest.raises(UserError) as caught:
        sweep_slurm.check_partition(partition, gpus)
    assert one_line(caught).startswith(message)


@pytest.mark.parametrize(
    ("resources", "count"),
    [
        ("(null)", 0),
        ("gpu:4", 4),
        ("gpu:h100", 1),
        ("gpu:h100:4(S:0-1)", 4),
        ("gpu:a100:4(S:0,2),gpu:v100:2(S:1)", 6),
        ("gpu:3090:4", 4),
        ("gpu:2080ti:8(S:0-1)", 8),
        ("gpu:1g.10gb:7,shard:2", 7),
    ],
)
def test_the_gpus_of_a_node_are_read_whatever_their_type(resources: str, count: int) -> None:
    assert sweep_slurm._gpus_in(resources) == count


def test_counts_are_parsed() -> None:
    assert parse_counts("4, 1,2") == [1, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1 and at most "),
        (["--processes", "0"], "--processes must be at least 1 and at most "),
        (["--processes", "1,x"], "--processes=1,x: 'x' is not an integer; give such as 4, or 1,2,4"),
        (["--processes", "2,2"], "--processes=2,2: 2 is given twice"),
        (["--weak", "0"], "--weak must be at least 1 and at most "),
        (["--memory", "0"], "--memory must be greater than 0 and at most "),
        (["--reference", "bf16"], "--reference must be training or fp32, got bf16"),
        (["--slurm"], "--slurm needs --gpus-per-node"),
        (["--partition", "gpu"], "need --slurm; give it, or leave them out"),
        (["--slurm", "--gpus-per-node", "0", "--sbatch-argument", "x"], "--sbatch-argument='x' is not an option"),
        (["--processes", "2", "--random-tokens", "--beside", "none"], "--beside=none does not hold a sweep"),
        (["--warmup", "-1"], "--warmup must be at least 0 and at most "),
        (["--processes", "2", "--layout", "tp=4"], "--layout tp=4,sp=true,zero=1,micro=4 on 2 processes"),
    ],
)
def test_the_command_rejects_mistakes_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(
            app, ["sweep", str(QUICKSTART), *arguments, "--output", str(tmp_path / "out")], catch_exceptions=False
        )
    assert not (tmp_path / "out").exists()


def test_results_of_other_lengths_or_with_damage_further_down_are_damaged(tmp_path: Path) -> None:
    two = replace(ALONE, processes=2)
    with pytest.raises(UserError, match=f"layouts/{two.name}.json is damaged: it has 1 losses, the reference has 3"):
        make_rows([(ALONE, RESULT), (two, RESULT | {"losses": [8.0]})], 16, None, ALONE)
    result_path(tmp_path, ALONE.name).parent.mkdir()
    no_process = ALONE.to_dict() | {"processes": 0}
    for changes in ({"profile": {"kinds": 3}}, {"profile": {}}, {"milliseconds": [0.0]}, {"cell": no_process}):
        write_result(tmp_path, ALONE, RESULT)
        assert is_measured(tmp_path, ALONE.name)
        write_result(tmp_path, ALONE, RESULT | changes)
        assert not is_measured(tmp_path, ALONE.name)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"cell": 3}', '{"cell": {"layout": {}}}', "\xff"])
def test_a_damaged_result_is_measured_again(content: str, tmp_path: Path) -> None:
    cell = Cell(LAYOUT, 2, 16)
    result_path(tmp_path, cell.name).parent.mkdir()
    write_result(tmp_path, cell, {"losses": [1.0]})
    assert is_measured(tmp_path, cell.name)
    result_path(tmp_path, cell.name).write_bytes(content.encode("latin-1"))
    assert read_result(tmp_path, cell.name) is None and not is_measured(tmp_path, cell.name)
