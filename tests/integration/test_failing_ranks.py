"""Errors of ranks that have joined the others: the reason of the first to fail is printed, once, with its rank."""

from __future__ import annotations

import json
import sys

import pytest

from tests.integration.conftest import ROOT, Runner

PROGRAM = "tests.integration.failing_ranks"
LOST = "lost the connection to another rank, whose own output may say why"
DISK = "could not write '/x/y': No space left on device; free some space and start again"


@pytest.mark.parametrize(
    ("ranks", "error", "code", "line"),
    [
        ("1", "run", 1, "error: rank 1: the tokens are gone"),
        ("0", "run", 1, "error: rank 0: the tokens are gone"),
        ("0,1", "run", 1, "error: rank 0: the tokens are gone"),
        ("1", "user", 2, "error: rank 1: data.path=x has gone; restore it"),
        ("0,1", "user", 2, "error: rank 0: data.path=x has gone; restore it"),
        ("1", "disk", 1, f"error: rank 1: {DISK}"),
        ("0,1", "disk", 1, f"error: rank 0: {DISK}"),
        ("1", "kill", -9, f"error: rank 0 {LOST}"),
    ],
)
def test_the_reason_is_one_line(runner: Runner, ranks: str, error: str, code: int, line: str) -> None:
    name = f"failing-{ranks.replace(',', '-')}-{error}"
    found, errors = runner.all_ranks(name, module=PROGRAM, RANKS=ranks, ERROR=error)
    lines = [text for text in errors.splitlines() if text.startswith("error: ")]
    # The first to end does so with its code; the other one may be terminated at its end.
    assert code in {found[int(rank)] for rank in ranks.split(",")} <= {code, -15}, errors
    assert "Traceback" not in errors, errors
    bystander = [f"error: rank 1 {LOST}"] if ranks == "0" else []  # without a launcher, the store ends with rank 0
    assert lines == [line, *bystander[: len(lines) - 1]], errors


def test_an_error_of_all_ranks_names_none_and_each_ends_in_its_own_time(runner: Runner) -> None:
    found, errors = runner.all_ranks("failing-shared", module=PROGRAM, RANKS="0,1", ERROR="shared")
    assert (found, errors) == ([2, 2], "error: data.path=x has gone; restore it\n")


def test_a_bug_of_one_rank_is_one_traceback(runner: Runner) -> None:
    found, errors = runner.all_ranks("failing-1-bug", module=PROGRAM, RANKS="1", ERROR="bug")
    assert found[1] == 1
    assert errors.count("Traceback") == 1 and "ValueError: a bug" in errors and "error: " not in errors, errors
    status = json.loads((runner.folder / "runs" / "failing-1-bug" / "status.json").read_text())
    assert status["reason"].startswith("rank 1: ") and "a bug" in status["reason"]


def test_torchrun_adds_nothing(runner: Runner) -> None:
    launcher = ["-m", "megatron_mosa.cluster.torchrun", "--standalone", "--nproc-per-node", "2", "--module", PROGRAM]
    arguments = [*launcher, runner.config, *runner.overrides, "run.name=failing-torchrun"]
    done = runner.call(*arguments, python=sys.executable, RANKS="1", ERROR="run", PYTHONPATH=str(ROOT))
    told = [line for line in done.stderr.splitlines() if not line.startswith("watchdog: ")]
    assert (done.returncode, told) == (1, ["error: rank 1: the tokens are gone"]), done.stderr
