"""benchmarks/faults.py, which measures on GPUs what runs survive, with two of its faults on the CPU."""

from __future__ import annotations

from pathlib import Path

from benchmarks.faults import FAULTS, Bench, Row, line, markdown
from megatron_mosa.exit_codes import FAILED, STOPPED


def test_a_killed_rank_and_a_signal(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 2, "cpu", at_once=2)
    rows = bench.measure(["kill", "term"])
    logs = "".join(f"\n== {log.name}\n{log.read_text()[-1500:]}" for log in sorted((tmp_path / "logs").iterdir()))
    assert [row.problems for row in rows] == [[], []], logs
    kill, term = rows
    assert (kill.exit_code, kill.stacks, kill.newest) == (FAILED, 1, 10)
    assert (term.exit_code, term.stacks, term.newest) == (STOPPED, 0, 16)
    for row in rows:
        assert row.seconds is not None and 0 < row.seconds < 30
        assert row.deviation is not None and 0 < row.deviation < 1e-4  # at another layout, so not bitwise
    first, _ = markdown(rows, "2 x CPU").splitlines()[-2:]
    assert first.startswith(f"| {FAULTS['kill'].title} | TP 2 x DP 1 -> DP 2 | ") and first.endswith("| holds |")


def test_a_row_that_does_not_hold_says_why() -> None:
    row = Row("SIGSTOP of one rank", "DP 2 -> TP 2 x DP 1", 70.0, 1, 76, problems=["exit code 1 instead of 76"])
    assert line(row).endswith("DOES NOT HOLD: exit code 1 instead of 76")
    assert markdown([row], "").splitlines()[-1] == (
        "| SIGSTOP of one rank | DP 2 -> TP 2 x DP 1 | 70.0 s | 1 (76) |  | none |  | "
        "**does not hold**: exit code 1 instead of 76 |"
    )
