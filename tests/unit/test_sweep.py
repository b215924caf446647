"""Layouts of a sweep, its output directory, and its report from hand-made results."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_mosa.cli import app
from megatron_mosa.config import Config, load_config
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.tools.scaling.layouts import SweepLayout, check_layouts, default_layouts, parse_layout, valid_layouts
from megatron_mosa.tools.scaling.sweep import _refuse_deviations, failure, prepare_output
from megatron_mosa.tools.scaling.sweep_report import Row, Sweep, deviation, markdown, write_report
from megatron_mosa.tools.scaling.sweep_worker import communication_seconds

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
    ],
)
def test_layouts_are_parsed_and_completed(config: Config, text: str, expected: SweepLayout) -> None:
    layout = parse_layout(text, config)
    assert layout == expected
    assert parse_layout(str(layout), config) == layout
    applied = layout.apply(config)
    assert (applied.parallel.tensor_model_parallel_size, applied.parallel.zero_stage) == (layout.tp, layout.zero)
    assert (applied.parallel.sequence_parallel, applied.train.micro_batch_size) == (layout.sp, layout.micro)
    assert config.train.micro_batch_size == 4  # a copy


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tp2", ["'tp2' is not KEY=VALUE", "the keys are tp, sp, zero, micro"]),
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
def test_an_invalid_layout_is_reported_with_its_neighbours(
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


RESULT = {
    "tokens_per_step": 4096,
    "losses": [8.0, 6.0, 4.0],
    "grad_norms": [1.0, 2.0, 4.0],
    "step_seconds": [2.0, 9.0, 4.0],
    "peak_memory_gib": 0.5,
    "communication_share": 0.25,
    "device": "CPU",
    "layout": {"tp": 1, "sp": False, "zero": 0, "micro": 4},
}


def hand_made(config: Config, device: str = "cpu") -> Sweep:
    """The reference, a layout that deviates by 0.5 in a loss of 4 and by 0.1 in a norm of 2, and one that failed."""
    other = RESULT | {"losses": [8.0, 6.0, 4.5], "grad_norms": [1.0, 1.9, 4.0], "step_seconds": [1.0, 2.0, 100.0]}
    rows = [
        Row.of_reference(RESULT),
        Row.of_layout(SweepLayout(2, True, 1, 4), 2, other, RESULT),
        Row.of_layout(SweepLayout(1, False, 3, 8), 2, {"reason": "OutOfMemoryError: 3|4"}, RESULT),
    ]
    return Sweep(config, rows, 2, "mosa sweep x.yaml", device, {"torch": "9.9"})


def test_the_tables(config: Config, tmp_path: Path) -> None:
    write_report(hand_made(config), tmp_path)
    text = (tmp_path / "results.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert table == [
        "| reference: tp=1,sp=false,zero=0,micro=4, fp32 | 1 | 1,024 | 4 | 0.50 | 25 % | 0.0e+00 | 0.0e+00 |",
        "| tp=2,sp=true,zero=1,micro=4 | 2 | 1,024 | 2 | 0.50 | 25 % | 1.2e-01 | 5.0e-02 |",
        "| tp=1,sp=false,zero=3,micro=8 | 2 | failed: OutOfMemoryError: 3\\|4 | | | | | |",
    ]
    assert "functional, not performance: ranks share" in text
    assert "torch 9.9" in text and "    mosa sweep x.yaml" in text
    with (tmp_path / "results.csv").open() as file:
        reference, other, failed = csv.DictReader(file)
    assert (reference["status"], other["status"], failed["status"]) == ("reference", "ok", "failed")
    assert float(other["tokens_per_second_per_rank"]) == 4096 / 2 / 2  # median 2 s, two ranks
    assert float(other["loss_deviation"]) == 0.125
    assert failed["reason"] == "OutOfMemoryError: 3|4" and failed["loss_deviation"] == ""
    assert all(row["note"] == "functional, not performance" for row in (reference, other, failed))
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_numbers_have_no_note(config: Config) -> None:
    sweep = hand_made(config, "cuda")
    text = markdown(replace(sweep, rows=[replace(row, device="H100") for row in sweep.rows]))
    assert "functional" not in text and "2 x H100 (nccl)" in text


def test_deviations_beyond_the_tolerance_are_errors(config: Config) -> None:
    assert deviation([1.0, -2.2], [1.0, -2.0]) == pytest.approx(0.1)
    sweep = hand_made(config)
    with pytest.raises(RunError, match=r"more than 0.001 \(fp32\): tp=2,sp=true,zero=1,micro=4 \(1.2e-01\)$"):
        _refuse_deviations(sweep, "fp32")
    close = replace(sweep, rows=[replace(row, loss_deviation=0.01) for row in sweep.rows])
    _refuse_deviations(close, "bf16")
    with pytest.raises(RunError):
        _refuse_deviations(close, "fp32")
    steep = replace(sweep, rows=[replace(row, loss_deviation=1e-4, grad_norm_deviation=0.067) for row in sweep.rows])
    with pytest.raises(RunError, match="gradient norms deviate from the reference by more than 0.01"):
        _refuse_deviations(steep, "fp32")


def test_communication_counts_only_collectives_and_overlaps_once() -> None:
    intervals = [
        ("gloo:all_reduce", 3.0, 4.0),
        ("gloo:all_gather", 0.0, 1.0),
        ("ncclDevKernel_AllReduce_Sum_f32", 0.5, 1.5),
        ("gloo:reduce", 0.6, 0.7),
        ("c10d::allreduce_", 1.5, 3.0),  # only enqueues the operation
        ("aten::mm", 0.0, 9.0),
    ]
    assert communication_seconds(intervals) == pytest.approx(2.5)
    assert communication_seconds([]) == 0.0


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


def test_the_reason_of_a_failed_run(tmp_path: Path) -> None:
    log, errors = tmp_path / "x.log", tmp_path / "x.error"
    assert failure(errors, log, 7) == "exit code 7; see x.log"
    (tmp_path / "x.error.rank1").write_text("OutOfMemoryError: no room")
    assert failure(errors, log, 1) == "OutOfMemoryError: no room"
    log.write_text("Signal 9 (SIGKILL) received by PID 1\nRoot Cause (first observed failure):\n Signal 6 (SIGABRT) re")
    assert failure(errors, log, 1) == "OutOfMemoryError: no room"
    log.write_text("Root Cause (first observed failure):\n traceback : Signal 9 (SIGKILL) received by PID 3")
    assert "SIGKILL, often for lack of memory" in failure(errors, log, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
        (["--warmup", "-1"], "--warmup must be at least 0, got -1"),
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
