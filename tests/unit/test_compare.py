"""Runs side by side, the totals of a run, and journals with damaged lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_mosa.metrics import Journal, read_journal, run_totals
from megatron_mosa.tools.comparison import curves
from megatron_mosa.tools.comparison.command import compare
from megatron_mosa.tools.comparison.curves import Point, RunCurves, read_run, table


def lines(speed: float) -> list[dict]:
    """Three steps of 100 tokens, of which every second is reported, and a validation."""
    rate = {"tokens_per_second": speed, "mfu": 0.5}
    return [
        {"step": 1, "tokens": 100, "loss": 3.0, "causal": True} | rate,
        {"step": 3, "tokens": 300, "loss": 2.0, "causal": True} | rate | {"tokens_per_second": 2 * speed, "mfu": 0.25},
        {"step": 3, "tokens": 300, "validation_loss": 2.5, "causal": True},
    ]


def write(run: Path, found: list[dict]) -> Path:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return run


def test_totals_of_a_run() -> None:
    totals = run_totals(lines(50.0))
    assert (totals.steps, totals.tokens, totals.seconds) == (3, 300, 2.0 + 2.0)
    assert (totals.tokens_per_second, totals.mfu, totals.duration) == (75.0, 0.375, "0:00:04")
    assert run_totals([]).tokens_per_second == 0.0


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write(tmp_path / name, lines(speed)) for name, speed in (("slow", 50.0), ("fast", 100.0))]
    found = read_run(runs[0])
    assert found.training == [(1, 100, 2.0, 3.0, True), (3, 300, 4.0, 2.0, True)]
    assert found.validation == [(3, 300, 4.0, 2.5, True)] and found.label == "slow"
    compare(runs, output=tmp_path / "made" / "runs.png")
    printed = capsys.readouterr().out
    assert "slow" in printed and "0:00:04" in printed and "0:00:02" in printed
    assert (tmp_path / "made" / "runs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("causal", "label", "marks"),
    [
        ((False, False, True), "run, training NON-CAUSAL", ["NO", "yes"]),
        ((False, True, True), "run, training NON-CAUSAL in the warm-up", ["yes", "yes"]),
        ((False, False, False), "run, NON-CAUSAL", ["NO", "NO"]),
    ],
)
def test_each_loss_has_the_mark_of_its_line(
    causal: tuple[bool, ...], label: str, marks: list[str], tmp_path: Path
) -> None:
    marked = [line | {"causal": is_causal} for line, is_causal in zip(lines(50.0), causal, strict=True)]
    found = read_run(write(tmp_path / "run", marked))
    assert found.label == label
    columns = table([found]).columns
    assert [next(iter(column.cells)) for column in columns if column.header == "causal"] == marks


def test_a_run_that_diverged_does_not_show_its_last_finite_loss(tmp_path: Path) -> None:
    diverged = [line | {"step": 5, "tokens": 500} for line in lines(50.0)[1:]]
    diverged = [line | {name: None for name in ("loss", "validation_loss") if name in line} for line in diverged]
    drawn = table([read_run(write(tmp_path / name, lines(50.0) + more)) for name, more in (("a", []), ("b", diverged))])
    losses = [list(column.cells) for column in drawn.columns if column.header in ("loss", "val. loss")]
    assert losses == [["2.0000", "not finite"], ["2.5000", "not finite"]]


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([write(tmp_path / name, lines(50.0)) for name in ("a/x/run", "b/x/run")], output=tmp_path / "runs.png")
    printed = capsys.readouterr().out
    assert "a/x/run" in printed and "b/x/run" in printed


@pytest.mark.parametrize("name", ["run", "tiny-novels-expert_choice-rho64-seed1-lr0.002", "A_VERY_LONG_NAME" * 8])
def test_the_legend_fits_into_the_picture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, *_, **__: drawn.append(figure))
    points = [Point(1.0, 100.0, 2.0, 3.0, False), Point(3.0, 300.0, 4.0, 2.0, False)]
    curves.plot([RunCurves(name, run_totals([]), points, points) for _ in range(12)], tmp_path / "out.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1 and legend.height < figure.bbox.height / 2
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines[::2]}) == 12


def test_damaged_lines_are_set_aside(tmp_path: Path) -> None:
    whole = lines(50.0)
    file = write(tmp_path / "run", whole) / "metrics.jsonl"
    text = file.read_text()
    file.write_text(text + '{"step": 4, "lo')  # a crash cut it off
    assert Journal(file, resumed_step=3).damage is None
    file.write_bytes(b"\xff\xfe garbage\n[1]\n" + text.encode() + b'{"step": "four"}\n' + b'{"step": 4, "lo')
    damage = Journal(file, resumed_step=3).damage
    assert damage is not None and "has 3 damaged lines" in damage and "kept as damaged-metrics.jsonl" in damage
    assert read_journal(file) == whole
    assert (tmp_path / "run" / "damaged-metrics.jsonl").read_bytes().startswith(b"\xff\xfe")
