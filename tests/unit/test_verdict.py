"""Whether a run that ended starts again: the policy, its state in slurm.json, and the output for the batch script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mosa.cluster.slurm.begin import begin
from megatron_mosa.cluster.slurm.preflight import note_failure
from megatron_mosa.cluster.slurm.record import Record, checkpoint_step, outcome
from megatron_mosa.cluster.slurm.verdict import judge_attempt, settle_attempt
from megatron_mosa.config import load_config
from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import TIME_LIMIT

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOSA_ATTEMPT", "MOSA_CHAIN", "MOSA_MAX_RETRIES", "MOSA_BACKOFF_SECONDS"):
        monkeypatch.delenv(name, raising=False)


def leave_status(run: Path, **content: object) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text(json.dumps(content))


def write_checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("code", "verdict", "failures"),
    [
        (0, "done", 0),
        (2, "stop", 1),
        (3, "stop", 1),
        (75, "again", 1),
        (1, "again", 2),
        (76, "again", 2),
        (137, "again", 2),
        (143, "again", 2),
    ],
)
def test_exit_codes(code: int, verdict: str, failures: int) -> None:
    record = Record(failures=1, step=7)
    judge_attempt(record, code, "why", 7, max_retries=5, backoff=10)
    assert (record.verdict, record.failures, record.reason) == (verdict, failures, "why")


def test_waits_double_up_to_ten_minutes_until_retries_run_out() -> None:
    record = Record()
    waits = [judge_attempt(record, 1, "crash", 0, max_retries=8, backoff=10) for _ in range(8)]
    assert waits == [10, 20, 40, 80, 160, 320, 600, 600]
    assert record.verdict == "again"
    judge_attempt(record, 1, "crash", 0, max_retries=8, backoff=10)
    assert record.verdict == "stop"
    assert record.reason == "9 failures in a row without a checkpoint after step 0; last: crash"


def test_only_a_newer_checkpoint_resets_the_count() -> None:
    record = Record(failures=5, step=10)
    judge_attempt(record, 75, "stopped", 10, max_retries=5, backoff=10)  # a stop is neither a failure nor progress
    assert record.failures == 5
    assert judge_attempt(record, 1, "crash", 11, max_retries=5, backoff=10) == 10
    assert (record.failures, record.step) == (1, 11)


def test_jobs_too_short_for_a_step_are_failures(tmp_path: Path) -> None:
    """Otherwise a run whose time ends before its first step would be requeued for ever."""
    record = Record()
    assert settle_attempt(record, tmp_path, 75, TIME_LIMIT) == f"requeue 10 {TIME_LIMIT}"
    write_checkpoint(tmp_path, 3)
    assert settle_attempt(record, tmp_path, 75, TIME_LIMIT) == f"requeue 0 {TIME_LIMIT}"
    assert record.failures == 0
    lines = [settle_attempt(record, tmp_path, 75, TIME_LIMIT) for _ in range(6)]
    assert lines[4] == f"requeue 160 {TIME_LIMIT}"
    assert lines[5] == f"stop 6 failures in a row without a checkpoint after step 3; last: {TIME_LIMIT}"


def test_the_runs_own_status_counts_if_this_attempt_wrote_it(tmp_path: Path) -> None:
    leave_status(tmp_path, attempt="7-0-1", state="stopped", exit_code=75, reason="SIGUSR1")
    assert outcome(tmp_path, "7-0-1", 137) == (75, "SIGUSR1")  # srun killed a slower rank
    assert outcome(tmp_path, "7-0-2", 137) == (137, "killed by signal 9")
    leave_status(tmp_path, attempt="7-0-2", state="running", step=3)
    assert outcome(tmp_path, "7-0-2", 1) == (1, "failed")
    assert outcome(tmp_path, "7-0-2", None)[0] == 1
    (tmp_path / "status.json").write_text('{"attempt": "7-0-2", "sta')
    assert outcome(tmp_path, "7-0-2", 76) == (76, "hung")


def test_only_published_checkpoints_count(tmp_path: Path) -> None:
    assert checkpoint_step(tmp_path) == 0
    for name in ("step-00000004", "step-00000012", "step-00000003", "damaged-step-00000090", ".writing-step-99"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint_step(tmp_path) == 12


def call(run: Path, code: int, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_mosa.cluster.slurm.verdict", str(run), str(code)]
    environment = {"PYTHONPATH": str(QUICKSTART.parents[1])} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_program_prints_a_verdict_and_keeps_count(tmp_path: Path) -> None:
    variables = {"MOSA_ATTEMPT": "1-0-1", "MOSA_BACKOFF_SECONDS": "3", "MOSA_MAX_RETRIES": "2"}
    run = tmp_path / "run"
    lines = [call(run, code, **variables).stdout for code in (1, 137, 1)]
    last = "stop 3 failures in a row without a checkpoint after step 0; last: failed\n1\n"
    assert lines == ["again 3 failed\n1\n", "again 6 killed by signal 9\n137\n", last]
    write_checkpoint(run, 5)
    leave_status(run, attempt="1-0-1", state="stopped", exit_code=75, reason="time\nlimit")
    assert call(run, 143, **variables).stdout == "again 0 time limit\n75\n"
    assert json.loads((run / "slurm.json").read_text())["failures"] == 0
    assert call(run, 0, MOSA_ATTEMPT="1-0-2").stdout == "done\n0\n"


def test_the_program_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from megatron_mosa.cluster.slurm import begin, verdict; "
        "assert verdict and begin and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(QUICKSTART.parents[1])})


def test_an_attempt_with_an_invalid_layout_does_not_start(tmp_path: Path) -> None:
    """The suggested batch sizes fit all data-parallel ranks."""
    values = [f"run.directory={tmp_path}", "run.name=run", "train.global_batch_size=24", "train.micro_batch_size=5"]

    def lines(processes: str, *values: str) -> list[str]:
        command = [sys.executable, "-m", "megatron_mosa.cluster.slurm.begin", processes, str(QUICKSTART), *values]
        environment = {"PYTHONPATH": str(QUICKSTART.parents[1])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout == "") in ((0, False), (2, True))
        return (done.stdout or done.stderr).splitlines()

    (error,) = lines("8", *values)
    assert error.endswith(
        "=5 x 4 data-parallel ranks = 20; set train.global_batch_size=20, or train.micro_batch_size=3 or 6"
    )
    assert not (tmp_path / "run").exists()
    assert lines("8", *values, "train.micro_batch_size=3") == [str(tmp_path / "run"), "go"]
    assert lines(str(QUICKSTART)) == [
        "error: usage: python -m megatron_mosa.cluster.slurm.begin PROCESSES CONFIG [section.key=value ...]"
    ]


def test_usage_errors_are_one_line(tmp_path: Path) -> None:
    done = call(tmp_path, 1, MOSA_MAX_RETRIES="many")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: MOSA_MAX_RETRIES must be a number of at least 0, got many")
    with (
        pytest.raises(UserError, match="MOSA_BACKOFF_SECONDS must be .*, got -1"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MOSA_BACKOFF_SECONDS", "-1")
        settle_attempt(Record(), tmp_path, 1, "")


class Run:
    """The run directory of a quickstart with 100 steps."""

    def __init__(self, folder: Path) -> None:
        self.config = load_config(QUICKSTART, [f"run.directory={folder}", "train.steps=100"])
        self.path = folder / "quickstart"

    def begin(self, attempt: str, chain: str = "") -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOSA_ATTEMPT", attempt)
            if chain:
                patch.setenv("MOSA_CHAIN", chain)
            run, line = begin(self.config)
        assert run == self.path
        return line

    def end(self, code: int) -> str:
        return settle_attempt(Record.read(self.path), self.path, code, "why")


def test_an_attempt_whose_end_nobody_saw_is_a_failure_unless_its_status_differs(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.begin("1-0-1") == "go"
    assert run.begin("1-1-1") == "go"
    assert (Record.read(run.path).failures, Record.read(run.path).starts) == (1, 2)
    leave_status(run.path, attempt="1-1-1", state="stopped", exit_code=75)
    assert run.begin("1-2-1") == "go"
    assert Record.read(run.path).failures == 1
    for number in range(3, 7):
        assert run.begin(f"1-{number}-1") == "go"
    assert run.begin("1-7-1").startswith("stop 6 failures in a row")


def test_a_chain_ends_with_the_run_and_a_longer_run_continues(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.begin("1-0-1", chain="a") == "go"
    write_checkpoint(run.path, 100)
    assert run.end(0) == "done"
    assert run.begin("2-0-1", chain="a") == "done"
    run.config.train.steps = 101
    assert run.begin("3-0-1") == "go"


def test_a_stop_ends_its_chain_and_a_new_submission_resets_the_count(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.begin("1-0-1", chain="a") == "go"
    assert run.end(3) == "stop why"
    assert run.begin("2-0-1", chain="a").startswith("stop as the previous job of this chain (why)")
    record = Record.read(run.path)
    record.failures = 6
    record.write(run.path)
    assert run.begin("3-0-1", chain="b") == "go"
    assert Record.read(run.path).failures == 0


def test_a_node_that_fails_preflight_twice_is_excluded(tmp_path: Path) -> None:
    report = tmp_path / "preflight.json"
    report.write_text(json.dumps({"bad_nodes": ["n7", "n9"]}))
    assert note_failure(tmp_path, report) == ("again 10 preflight failed on n7, n9", [])
    report.write_text(json.dumps({"bad_nodes": ["n9", "n3"]}))
    assert note_failure(tmp_path, report) == ("again 20 preflight failed on n9, n3", ["n9"])
    assert note_failure(tmp_path, tmp_path / "none")[1] == []
