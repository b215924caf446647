"""Faults in real runs over two nodes of a real Slurm: each run ends with the losses of an undisturbed one."""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime

import psutil
import pytest
import yaml

from tests.slurm.conftest import TIMES, Jobs
from tests.slurm.test_submit import submit

STEPS = list(range(1, 7))
LONGER = (
    "train.steps=6",
    "validation.interval=3",
    "checkpoint.interval=1",
    "checkpoint.keep_last=6",
    "resilience.stop_before_limit=0",
)
TENSOR_PARALLEL = (*LONGER, "parallel.tensor_model_parallel_size=2")
DATA_PARALLEL = (*LONGER, "parallel.tensor_model_parallel_size=1")
MUCH_TIME, NO_TIME = "0", "9" * 12  # MOSA_MIN_SECONDS that make the run restart in the job, or by requeue


def fault(name: str, *, rank: int = 1, step: int = 4, place: str = "step") -> tuple[str, ...]:
    values = {"fault": name, "rank": rank, "step": step, "place": place}
    return tuple(f"fault_injection.{key}={value}" for key, value in values.items())


@pytest.fixture(scope="module")
def undisturbed(training: Jobs) -> list[float]:
    return run_to_the_end(training, "undisturbed-tp2", *TENSOR_PARALLEL)


@pytest.fixture(scope="module")
def undisturbed_data_parallel(training: Jobs) -> list[float]:
    return run_to_the_end(training, "undisturbed-dp2", *DATA_PARALLEL)


def run_to_the_end(jobs: Jobs, name: str, *overrides: str) -> list[float]:
    """Complete a run over two nodes; return its losses."""
    wait_until_done(jobs, jobs.submit(name, "--nodes=2", overrides=overrides), name)
    return jobs.losses(name)


@pytest.mark.parametrize("name", ["undisturbed-tp2", "undisturbed-dp2"])
def test_a_run_over_two_nodes(
    training: Jobs, undisturbed: list[float], undisturbed_data_parallel: list[float], name: str
) -> None:
    assert undisturbed == pytest.approx(undisturbed_data_parallel, abs=1e-5)
    run = training.run(name)
    assert training.steps(name) == STEPS
    assert (run / "checkpoints" / "step-00000006").is_dir()
    (logs,) = (run / "logs").iterdir()
    assert logs.name.endswith("-0-1") and sorted(log.name for log in logs.iterdir()) == ["rank-0.log", "rank-1.log"]
    record = json.loads((run / "slurm.json").read_text())
    assert record["verdict"] == "done" and record["starts"] == 1


def wait_until_done(jobs: Jobs, job: str, name: str) -> None:
    state = jobs.cluster.wait_for_job(job)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), jobs.explain(name)
    assert processes_of(jobs, name) == []


def processes_of(jobs: Jobs, name: str) -> list[int]:
    """Return the processes that a run left behind; other suites on this machine have runs of the same name."""
    words, data = {f"run.name={name}"}, f"data.path={jobs.folder}/"
    commands = {process.pid: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    return [
        pid
        for pid, command in commands.items()
        if words & {*command} and any(word.startswith(data) for word in command)
    ]


def check_recovery(jobs: Jobs, name: str, losses: list[float]) -> None:
    """Check that the run resumed from a checkpoint and reached the same losses; record how long that took."""
    attempts = sorted((jobs.run(name) / "logs").glob("*-*"), key=lambda path: path.stat().st_mtime)
    # On a busy machine the preflight may time out, and that attempt does not train.
    attempts = [attempt for attempt in attempts if (attempt / "rank-0.log").exists()]
    outputs = [(attempt / "rank-0.log").read_text() for attempt in attempts]
    resumed = [re.search(r"resumed from \S*step-0*(\d+)", text) for text in outputs]
    assert resumed[0] is None and resumed[-1] is not None, jobs.explain(name)  # never from step 0 again
    assert jobs.steps(name) == STEPS
    assert jobs.losses(name) == losses, jobs.explain(name)
    injected = (jobs.run(name) / "fault_injected").stat().st_mtime
    ended = re.search(rf"^(.{{19}}) .* attempt {attempts[0].name} ended", jobs.output(name), re.MULTILINE)
    step = next(int(match[1]) for match in resumed if match)  # the first time: a later attempt may find the run done
    first_new = jobs.run(name) / "checkpoints" / f"step-{step + 1:08d}" / "manifest.json"
    end = datetime.fromisoformat(ended[1]).timestamp() if ended else float("nan")  # the script itself died
    TIMES[name] = (end - injected, first_new.stat().st_mtime - injected)


@pytest.mark.parametrize(
    ("name", "place", "step"), [("SIGTERM", "save", 4), ("SIGTERM", "validation", 3), ("kill", "step", 4)]
)
def test_a_signal_or_a_killed_rank(training: Jobs, undisturbed: list[float], name: str, place: str, step: int) -> None:
    jobs, run = training, f"{name}-{place}"
    overrides = (*TENSOR_PARALLEL, *fault(name, step=step, place=place))
    job = jobs.submit(run, "--nodes=2", overrides=overrides, MOSA_MIN_SECONDS=MUCH_TIME)
    wait_until_done(jobs, job, run)
    check_recovery(jobs, run, undisturbed)
    assert jobs.cluster.job(job)["Restarts"] == "0"


def test_sigusr1_and_a_requeue(training: Jobs, undisturbed: list[float]) -> None:
    """Runs the real preflight before each start, and starts every program in a new Python."""
    jobs = training
    variables = {"MOSA_MIN_SECONDS": NO_TIME, "MOSA_PREFLIGHT": "1", "MOSA_PYTHON": sys.executable}
    job = jobs.submit("SIGUSR1-step", "--nodes=2", overrides=(*TENSOR_PARALLEL, *fault("SIGUSR1")), **variables)
    wait_until_done(jobs, job, "SIGUSR1-step")
    check_recovery(jobs, "SIGUSR1-step", undisturbed)
    assert jobs.cluster.job(job)["Restarts"] == "1"
    assert "again in 0 s: SIGUSR1" in jobs.output("SIGUSR1-step")
    report = jobs.run("SIGUSR1-step") / "logs" / f"{job}-0-1" / "preflight.json"
    assert json.loads(report.read_text())["bad_nodes"] == []


def test_scancel_saves_and_the_next_job_resumes(training: Jobs, undisturbed: list[float]) -> None:
    jobs = training
    overrides = (*TENSOR_PARALLEL, *fault("pause"), "fault_injection.seconds=2")
    job = jobs.submit("cancel", "--nodes=2", overrides=overrides)
    jobs.cluster.wait((jobs.run("cancel") / "fault_injected").exists, 60, "step that takes long")
    jobs.cluster.call("scancel", job)
    assert jobs.cluster.wait_for_job(job)["JobState"] == "CANCELLED"
    status = jobs.run("cancel") / "status.json"
    jobs.cluster.wait(lambda: json.loads(status.read_text())["state"] == "stopped", 20, "end of the ranks")
    assert jobs.steps("cancel") == [1, 2, 3, 4]
    wait_until_done(jobs, jobs.submit("cancel", "--nodes=2", overrides=overrides), "cancel")
    assert jobs.steps("cancel") == STEPS
    assert jobs.losses("cancel") == undisturbed


def test_a_rank_that_hangs(training: Jobs, undisturbed: list[float]) -> None:
    jobs = training
    overrides = (*TENSOR_PARALLEL, *fault("stop"), "resilience.hang_timeout=8")
    job = jobs.submit("stop", "--nodes=2", overrides=overrides, MOSA_MIN_SECONDS=MUCH_TIME)
    wait_until_done(jobs, job, "stop")
    check_recovery(jobs, "stop", undisturbed)
    assert "no progress for 8 s while" in (jobs.run("stop") / "stacks" / "rank-00000.txt").read_text()
    assert "again in 0 s: rank 0: no progress" in jobs.output("stop")


def test_a_time_limit(training: Jobs, undisturbed: list[float]) -> None:
    """A limit of one minute; Slurm checks every 30 s, so SIGUSR1 comes 10 to 40 s after the start."""
    jobs = training
    overrides = (*TENSOR_PARALLEL, *fault("pause"), "fault_injection.seconds=40")
    job = jobs.submit("limit", "--nodes=2", "--time=1", "--signal=USR1@20", overrides=overrides)
    wait_until_done(jobs, job, "limit")
    check_recovery(jobs, "limit", undisturbed)
    assert 1 <= int(jobs.cluster.job(job)["Restarts"]) <= 6  # on a slow machine training starts late
    assert ": SIGUSR1; " in jobs.output("limit")


@pytest.mark.parametrize("node", ["n2", "n1"])  # n1 runs the batch script and rank 0
def test_a_node_that_dies(training: Jobs, undisturbed: list[float], node: str) -> None:
    jobs, cluster = training, training.cluster
    overrides = (*TENSOR_PARALLEL, *fault("pause"))
    job = jobs.submit(node, "--nodes=2", overrides=overrides, MOSA_MIN_SECONDS=MUCH_TIME)
    injected = jobs.run(node) / "fault_injected"
    cluster.wait(injected.exists, 60, "step to die in")
    cluster.kill_node(node)
    injected.touch()
    cluster.wait(lambda: cluster.job(job)["JobState"] == "PENDING", 60, "requeue")
    cluster.start_node(node)
    wait_until_done(jobs, job, node)
    check_recovery(jobs, node, undisturbed)


def test_a_nan_loss(training: Jobs, undisturbed_data_parallel: list[float]) -> None:
    jobs = training
    expected = run_to_the_end(jobs, "skipped", *DATA_PARALLEL, "train.skip_steps=[4]")
    losses = run_to_the_end(jobs, "nan", *DATA_PARALLEL, *fault("nan"))
    assert losses[:3] == undisturbed_data_parallel[:3]
    assert losses == expected and losses != undisturbed_data_parallel, jobs.explain("nan")
    assert "step 4 skipped: loss nan" in (jobs.run("nan") / "logs").glob("*/rank-0.log").__next__().read_text()


def test_a_chain_resumes_where_the_previous_job_stopped(training: Jobs, undisturbed: list[float]) -> None:
    jobs = training
    options = ["--nodes=2", "--time=1:00:00", "--chain=3", "--sbatch-argument=--no-requeue", *fault("SIGUSR1")]
    done = submit(jobs, "run.name=links", *TENSOR_PARALLEL, *options, MOSA_MIN_SECONDS=NO_TIME)
    assert done.returncode == 0, done.stderr
    (folder,) = (jobs.run("links") / "submit").iterdir()
    first, second, third = (folder / "jobs.txt").read_text().split()
    assert f"job {first}, then {second}, then {third}: 2 node(s) x 1 task(s)" in done.stdout
    assert f"scancel {first} {second} {third}" in done.stdout
    states = [jobs.cluster.wait_for_job(job) for job in (first, second, third)]
    log = (jobs.run("links") / "logs" / f"slurm-{third}.out").read_text()
    assert [state["ExitCode"] for state in states] == ["75:0", "0:0", "0:0"], log
    assert "the run is done" in log and "attempt" not in log
    assert jobs.steps("links") == STEPS
    assert jobs.losses("links") == undisturbed
    assert json.loads((jobs.run("links") / "slurm.json").read_text())["starts"] == 2
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 6
    assert "torch" in json.loads((folder / "versions.json").read_text())
    assert (folder / "git.txt").read_text().startswith(("commit ", "not a git checkout"))
    assert (folder / "command.txt").read_text().startswith("mosa submit ")


def test_a_run_resumes_on_another_number_of_nodes(training: Jobs, undisturbed_data_parallel: list[float]) -> None:
    jobs = training
    wait_until_done(
        jobs, jobs.submit("shrunk", "--nodes=2", overrides=(*DATA_PARALLEL, "train.stop_after_step=3")), "shrunk"
    )
    assert jobs.steps("shrunk") == [1, 2, 3]
    wait_until_done(jobs, jobs.submit("shrunk", "--nodes=1", overrides=DATA_PARALLEL), "shrunk")
    assert jobs.steps("shrunk") == STEPS
    assert jobs.losses("shrunk")[:4] == undisturbed_data_parallel[:4]
    assert jobs.losses("shrunk") == pytest.approx(undisturbed_data_parallel, abs=1e-6)
