"""Signals, deadlines, watchdog, spikes, status and fault injection, each alone or in its own process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from megatron_mosa.cli import app
from megatron_mosa.cluster.slurm.record import Record
from megatron_mosa.cluster.status import facts, goes_on, is_well
from megatron_mosa.config import Config
from megatron_mosa.config.schema import FaultInjectionSection, ResilienceSection
from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import DONE, FAILED, HUNG, STOPPED, TIME_LIMIT, USAGE_ERROR
from megatron_mosa.resilience import deadline, watchdog
from megatron_mosa.resilience.faults import FaultInjection
from megatron_mosa.resilience.interruption import Interruption, Signals
from megatron_mosa.resilience.services import ResilienceServices
from megatron_mosa.resilience.spikes import SpikeDetector
from megatron_mosa.resilience.status import RunStatus, read_status

LISTENER = """
import os, signal, sys, threading, time
from megatron_mosa.resilience.interruption import Interruption, Signals, block_sigusr1
if sys.argv[1] == "imports":
    block_sigusr1()
    print("ready", file=sys.stdout, flush=True)
    time.sleep(0.5)
signals = Signals()
signals.listen()
print("ready", flush=True)
if sys.argv[1] == "blocked":
    lock = threading.Lock(); lock.acquire(); os.read(os.pipe()[0], 1)  # a system call that signals do not interrupt
interruption = Interruption(signals, None)
while interruption.agreed_reason() is None:
    time.sleep(0.01)
print(interruption.agreed_reason(), flush=True)
time.sleep(60 if sys.argv[1] == "stays" else 0)
signals.close()
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a process and wait until it prints that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_requests_a_stop(number: signal.Signals) -> None:
    process = start(LISTENER, "ends")
    process.send_signal(number)
    assert process.communicate(timeout=240)[0] == f"{number.name}\n"
    assert process.returncode == 0


def test_sigusr1_is_held_until_the_imports_are_done() -> None:
    process = start(LISTENER, "imports")
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=240)[0] == "ready\nSIGUSR1\n"
    assert process.returncode == 0


def test_a_second_sighup_ends_nothing() -> None:
    """When a terminal is closed, its shell and the kernel send one each."""
    process = start(LISTENER, "stays")
    assert process.stdout is not None
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "SIGHUP\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.kill()
    process.communicate()


@pytest.mark.parametrize("how", ["stays", "blocked", "unread"])
def test_a_second_signal_of_the_same_kind_ends_the_process_at_once(how: str) -> None:
    process = start(LISTENER, "stays" if how == "unread" else how)
    assert process.stderr is not None
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)  # another kind of signal
    time.sleep(0.3)
    assert process.poll() is None
    if how == "unread":
        process.stderr.close()
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    process.wait(timeout=240)
    assert (process.returncode, time.monotonic() - begun < 5) == (128 + signal.SIGTERM, True)
    assert how == "unread" or "received SIGTERM a second time" in process.stderr.read()


def test_signals_to_forked_processes_do_not_reach_the_parent() -> None:
    program = LISTENER.replace(
        'print("ready", flush=True)',
        """
child = os.fork()
if child == 0:
    time.sleep(60)
time.sleep(0.3)
os.kill(child, signal.SIGUSR1)
time.sleep(0.3)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
assert not signals.received, signals.received
print("ready", flush=True)""",
    )
    process = start(program, "ends")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=240)[0] == "SIGTERM\n"


def test_the_time_limit_is_a_reason_to_stop() -> None:
    assert Interruption(Signals(), time.time() + 60).agreed_reason() is None
    assert Interruption(Signals(), time.time() - 1).agreed_reason() == TIME_LIMIT


def test_the_end_time_of_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    assert deadline.job_end() is None
    end = int(time.time()) + 1000
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    assert deadline.job_end() == end
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    squeue = tmp_path / "squeue"
    for answer, expected in ((time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(end)), end), ("N/A", None), ("", None)):
        squeue.write_text(f"#!/bin/sh\n[ \"$*\" = '--noheader --format=%e --jobs=7' ] && echo {answer}\n")
        squeue.chmod(0o755)
        assert deadline.job_end() == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_sets_the_deadline_before_the_end_of_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: int
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    end = deadline.job_end()
    assert end is not None
    monkeypatch.setattr(Signals, "listen", lambda self: None)
    config = Config(resilience=ResilienceSection(stop_before_limit=300.0, hang_timeout=0))
    services = ResilienceServices.begin(config, tmp_path, rank)
    services.end()
    assert services.interruption.deadline == (end - 300 if rank == 0 else None)  # squeue is called once for all ranks


WATCHED = """
import os, signal, sys, time
from pathlib import Path
from megatron_mosa.resilience import watchdog
watchdog.GRACE_SECONDS = 0.5
dog = watchdog.Watchdog(Path(sys.argv[1]), 3, 1.0, lambda: print("on_hang", flush=True))
dog.start()
print("ready", flush=True)
def hang_here():
    time.sleep(60)
for step in range(5):
    dog.beat(f"taking step {step}")
    time.sleep(0.4)
hang_here()
"""


def test_the_watchdog_dumps_stacks_and_ends_a_hanging_process(tmp_path: Path) -> None:
    process = start(WATCHED, str(tmp_path / "stacks"))
    begun = time.monotonic()
    output, errors = process.communicate(timeout=240)
    assert process.returncode == HUNG and 3 < time.monotonic() - begun < 8  # 2 s of steps, 1 of silence, the grace
    assert output == "on_hang\n" and "no progress for 1 s while taking step 4" in errors
    stacks = (tmp_path / "stacks" / "rank-00003.txt").read_text()
    assert "hang_here" in stacks and "while taking step 4" in stacks


def test_the_watchdog_ends_a_process_whose_messages_nobody_reads(tmp_path: Path) -> None:
    process = start(WATCHED, str(tmp_path))
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=30) == HUNG


def test_time_during_which_a_process_is_stopped_is_not_a_hang(tmp_path: Path) -> None:
    process = start(WATCHED, str(tmp_path))
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    time.sleep(1.2)
    assert process.poll() is None and not (tmp_path / "rank-00003.txt").exists()
    process.kill()
    process.communicate()


SIBLINGS = """
import os, signal, subprocess, sys, time
from megatron_mosa.resilience.stopped import kill_stopped_ranks
if sys.argv[1] == "launch":
    start = lambda *words: subprocess.Popen([sys.executable, sys.argv[2], *words])
    ranks = [start("rank", sys.argv[3]), start("rank", sys.argv[3], "--local_rank=1"), start("other", sys.argv[3])]
    print(ranks[0].wait(60), ranks[1].wait(60), ranks[2].poll())
    ranks[2].kill()
elif sys.argv[1] == "rank" and len(sys.argv) == 3:
    stopped = lambda: len(os.listdir(sys.argv[2])) == 2
    while not stopped():
        time.sleep(0.01)
    time.sleep(0.2)
    kill_stopped_ranks()
else:
    open(os.path.join(sys.argv[2], f"{os.getpid()}"), "w").close()
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_ranks_that_are_stopped_are_killed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "stopped").mkdir()
    script = tmp_path / "siblings.py"
    script.write_text(SIBLINGS)
    command = [sys.executable, str(script), "launch", str(script), str(tmp_path / "stopped")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout.split() == ["0", "-9", "None"], done.stdout + done.stderr


@pytest.mark.parametrize(("stopped", "fires_after"), [(0, 11), (100, 111), (4, 11)])
def test_time_during_suspension_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stopped: int, fires_after: int
) -> None:
    """The watchdog checks every second; in its fifth second the process is suspended, or merely slow."""
    now, fired = 0, []

    class Seconds:
        def wait(self, interval: float) -> bool:
            nonlocal now
            now += max(1, stopped) if now == 4 else 1
            return bool(fired) or now > 200

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now))
    dog = watchdog.Watchdog(tmp_path, 0, 10, lambda: None)
    monkeypatch.setattr(dog, "_ended", Seconds())
    monkeypatch.setattr(dog, "end_process", lambda *args: fired.append(now))
    dog._watch()
    assert fired == [fires_after]


def test_spikes_exceed_the_window_and_do_not_enter_it() -> None:
    spikes = SpikeDetector(sigmas=6, window=4)
    losses = [5.0, 5.1, 4.9, 5.0]  # deviation 0.0707
    assert [spikes.excess(step, loss) for step, loss in enumerate(losses)] == [None] * 4
    assert spikes.excess(4, 5.42) is None  # 5.9 sigmas; 4.9 to 5.42 from now on
    spikes = SpikeDetector(sigmas=6, window=4)
    for step, loss in enumerate(losses):
        spikes.excess(step, loss)
    assert spikes.excess(4, 5.43) == pytest.approx(0.43 / 0.005**0.5)
    assert spikes.excess(5, 5.43) is not None  # the first spike did not enter the window
    assert spikes.excess(6, 1.0) is None  # a lower loss is not a spike


def test_steps_that_are_repeated_after_a_rewind_enter_the_window_once() -> None:
    losses = [5.0, 5.1, 4.9, 5.0]
    spikes = SpikeDetector(sigmas=6, window=4)
    for step, loss in enumerate(losses):
        spikes.excess(step, loss)
    for step in (2, 3):  # with three losses known nothing is a spike, with four it is
        assert spikes.excess(step, losses[step]) is None
    assert spikes.excess(4, 5.43) == pytest.approx(0.43 / 0.005**0.5)


def test_status_of_a_run(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    status, other = RunStatus(tmp_path, is_main=True), RunStatus(tmp_path, is_main=False)
    status.update("not ours yet", step=1)
    status.end(FAILED, "not ours yet")
    assert read_status(tmp_path) is None
    for each in (status, other):
        each.begin()
    status.update("training", step=7, last_step=10, loss=2.5, seconds_per_step=2.0, tokens_per_second=100.0)
    other.update("something else", step=99)
    content = read_status(tmp_path)
    assert content is not None and (content["state"], content["step"], content["starts"]) == ("running", 7, 1)
    now = content["updated"]
    ended = content | {"state": "failed", "exit_code": 1}
    assert goes_on(content, Record()) and not goes_on(ended, Record())
    ended["job"] = "7"
    assert goes_on(ended, Record(attempt="7-0-1")) and goes_on(ended, Record(verdict="again"))
    assert not goes_on(ended, Record(verdict="stop"))
    assert is_well(content, now + 59) and not is_well(content, now + 61)
    assert facts(content, now)["time left"] == "0:00:06"
    assert facts(content, now)["step"] == "7 of 10"
    assert facts(content | {"last_step": 5}, now)["step"] == "7 (past the last one asked for, 5)"
    assert facts(content | {"skipped_steps": 1}, now)["skipped"] == "1 step since this start"
    assert facts(content, now + 100)["state"].startswith("no update for 0:01:40; last: training")
    assert facts(content, now - 0.5)["updated"] == "0:00:00 ago"
    assert facts(content, now - 5)["updated"].startswith("0:00:05 in the future, by this host's clock")
    other.end(HUNG, "rank 1: no progress")
    status.end(FAILED, "rank 0: connection closed")  # a consequence of the hang
    content = read_status(tmp_path)
    assert content is not None and (content["state"], content["exit_code"], content["step"]) == ("hung", HUNG, 7)
    assert not is_well(content, now)
    again = RunStatus(tmp_path, is_main=True)
    again.begin()
    content = read_status(tmp_path)
    assert content is not None and (content["starts"], content["step"], "exit_code" in content) == (2, 7, False)
    for code, healthy in ((STOPPED, True), (DONE, True), (FAILED, False)):
        again = RunStatus(tmp_path, is_main=True)
        again.begin()
        again.end(code)
        content = read_status(tmp_path)
        assert content is not None and is_well(content, now + 1e6) is healthy


def test_a_mistake_before_the_start_is_recorded_for_the_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOSA_ATTEMPT", "7-0-1")
    running = RunStatus(tmp_path, is_main=True)
    running.begin()
    monkeypatch.setenv("MOSA_ATTEMPT", "7-0-2")
    for rank, reason in enumerate(("world size 1", "another")):  # only the first reason counts
        RunStatus(tmp_path, is_main=rank == 0).end(USAGE_ERROR, reason)
    content = read_status(tmp_path)
    assert content is not None
    assert (content["attempt"], content["exit_code"], content["reason"]) == ("7-0-2", USAGE_ERROR, "world size 1")
    assert content["starts"] == 2


def test_mosa_status(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    status = RunStatus(run, is_main=True)
    status.begin()
    status.update("training", step=3, last_step=9, loss=1.25)
    assert CliRunner().invoke(app, ["status", str(run)]).exit_code == 0
    status.end(FAILED, "rank 4: out of memory")
    result = CliRunner().invoke(app, ["status", str(run), "--watch", "--interval", "0.1"])
    assert result.exit_code == 1
    assert re.search(r"failed: rank 4: out of memory", result.output) and "3 of 9" in result.output
    with pytest.raises(UserError, match=r"has no status.json that can be read.*; other runs there: one"):
        CliRunner().invoke(app, ["status", str(run.parent / "two")], catch_exceptions=False)


def test_a_fault_is_injected_once_at_its_place_and_step(tmp_path: Path) -> None:
    section = FaultInjectionSection(fault="error", rank=1, step=3, place="validation")
    FaultInjection(section, tmp_path, 0).inject("validation", 3)
    faults = FaultInjection(section, tmp_path, 1)
    faults.inject("validation", 2)
    faults.inject("step", 3)
    with pytest.raises(RuntimeError, match="injected by fault_injection"):
        faults.inject("validation", 3)
    FaultInjection(section, tmp_path, 1).inject("validation", 3)


@pytest.mark.parametrize("fault", ["nan", "garbage"])
def test_a_data_fault_affects_one_step_on_one_rank(tmp_path: Path, fault: str) -> None:
    section = FaultInjectionSection(fault=fault, rank=1, step=3)
    batches = [{"labels": torch.tensor([[3, 4]]), "loss_mask": torch.ones(1, 2)} for _ in range(2)]

    def changed_batches(rank: int, step: int) -> list[tuple[bool, bool]]:
        """Whether each batch has garbage labels, and whether it has a NaN loss mask."""
        found = list(FaultInjection(section, tmp_path, rank).with_data_fault(iter(batches), step - 1, 2))
        return [((b["labels"] == 0).all().item(), b["loss_mask"].isnan().all().item()) for b in found]  # type: ignore

    untouched = [(False, False)] * 2
    assert changed_batches(0, 3) == changed_batches(1, 2) == untouched
    assert changed_batches(1, 3) == [(fault == "garbage", fault == "nan")] * 2
    assert changed_batches(1, 3) == untouched  # once
    assert batches[0]["labels"].tolist() == [[3, 4]] and batches[0]["loss_mask"].all()


def test_status_json_is_plain_json(tmp_path: Path) -> None:
    status = RunStatus(tmp_path, is_main=True)
    status.begin()
    status.update("training", loss=None)
    assert json.loads((tmp_path / "status.json").read_text())["loss"] is None
