"""launch/slurm/pretrain.sbatch on a real two-node Slurm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import CONFIG, SCRIPT, Jobs

# Replaces pretrain_mosa.py in tests of what follows each exit code. Attempt n exits with the n-th word of EXITS;
# "137:2" exits with 137 after publishing a checkpoint of step 2.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
run = Path(next(a.split("=")[1] for a in sys.argv if a.startswith("run.directory="))) / next(
    a.split("=")[1] for a in sys.argv if a.startswith("run.name="))
attempt = os.environ["MOSA_ATTEMPT"]
seen = run / "attempts"
if os.environ["SLURM_PROCID"] == "0":
    with seen.open("a") as file:
        print(attempt, os.environ["SLURM_JOB_NODELIST"], file=file)
else:
    time.sleep(0.5)
number = len(seen.read_text().splitlines())
word = os.environ["EXITS"].split()[number - 1]
def end(code):
    if os.environ["SLURM_PROCID"] == "0":
        states = {0: "done", 1: "failed", 2: "wrong use", 3: "gave up", 75: "stopped"}
        if code in states:
            status = {"state": states[code], "exit_code": code, "attempt": attempt, "reason": "as asked"}
            (run / "status.json").write_text(json.dumps(status))
    os._exit(code)
if word == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: end(75))
    signal.signal(signal.SIGTERM, lambda *_: end(75))
    (run / "waiting").touch()
    for _ in range(1200):  # not one long sleep: a signal just before it would be handled after it
        time.sleep(0.05)
code, _, step = word.partition(":")
if step:
    (run / "checkpoints" / f"step-{int(step):08d}").mkdir(parents=True)
end(int(code))
"""


@pytest.fixture(scope="module")
def jobs(jobs: Jobs) -> Jobs:
    """Jobs with a layout that also fits on one node."""
    return replace(jobs, overrides=[*jobs.overrides, "parallel.tensor_model_parallel_size=1"])


@pytest.fixture(scope="module")
def stand_in(cluster: Cluster) -> str:
    """Return a directory with the stand-in as pretrain_mosa.py."""
    folder = cluster.folder / "stand-in"
    folder.mkdir()
    (folder / "pretrain_mosa.py").write_text(STAND_IN)
    return str(folder)


def record(jobs: Jobs, name: str) -> dict:
    return json.loads((jobs.run(name) / "slurm.json").read_text())


def attempts(jobs: Jobs, name: str) -> list[str]:
    return [line.split()[0] for line in (jobs.run(name) / "attempts").read_text().splitlines()]


def test_both_nodes_respond(cluster: Cluster) -> None:
    done = cluster.call("srun", "-N2", "sh", "-c", "echo $SLURMD_NODENAME")
    assert sorted(done.stdout.split()) == ["n1", "n2"], done.stderr


def test_failures_are_retried_in_the_job_and_progress_resets_the_count(jobs: Jobs, stand_in: str) -> None:
    exits = "1 137:1 1 0:4"  # without the checkpoint of the second, the third failure would be one too many
    job = jobs.submit("retry", "--nodes=2", MOSA_ROOT=stand_in, EXITS=exits, MOSA_MAX_RETRIES="2")
    assert jobs.cluster.wait_for_job(job)["JobState"] == "COMPLETED", jobs.output("retry")
    assert attempts(jobs, "retry") == [f"{job}-0-{number}" for number in (1, 2, 3, 4)]
    assert record(jobs, "retry")["failures"] == 0


def test_too_many_failures_and_permanent_ones_are_not_retried(jobs: Jobs, stand_in: str) -> None:
    for name, exits, count in (("capped", "1 1 1 0", 3), ("hopeless", "3 0", 1), ("misused", "2 0", 1)):
        job = jobs.submit(name, MOSA_ROOT=stand_in, EXITS=exits, MOSA_MAX_RETRIES="2")
        assert jobs.cluster.wait_for_job(job)["JobState"] == "FAILED", jobs.output(name)
        assert len(attempts(jobs, name)) == count
        assert "not started again" in jobs.output(name)
    assert "3 failures in a row without a checkpoint after step 0" in jobs.output("capped")


def test_a_stop_with_little_time_left_is_requeued(jobs: Jobs, stand_in: str) -> None:
    job = jobs.submit("requeue", "--nodes=2", MOSA_ROOT=stand_in, EXITS="75 0:4", MOSA_MIN_SECONDS="9" * 12)
    assert jobs.cluster.wait_for_job(job)["JobState"] == "COMPLETED", jobs.output("requeue")
    assert attempts(jobs, "requeue") == [f"{job}-0-1", f"{job}-1-1"]
    assert record(jobs, "requeue")["failures"] == 0


@pytest.mark.parametrize("target", ["-b", "--"])  # to the batch script, which forwards it; to the tasks
def test_a_signal_leads_to_a_requeue_or_a_restart(jobs: Jobs, stand_in: str, target: str) -> None:
    name = f"signal{target}"
    job = jobs.submit(name, "--nodes=2", MOSA_ROOT=stand_in, EXITS="wait 0:4")
    jobs.cluster.wait((jobs.run(name) / "waiting").exists, 20, "run that waits")
    jobs.cluster.call("scancel", "-s", "USR1", *([target] if target == "-b" else []), job)
    assert jobs.cluster.wait_for_job(job)["JobState"] == "COMPLETED", jobs.output(name)
    assert attempts(jobs, name) == [f"{job}-0-1", f"{job}-1-1" if target == "-b" else f"{job}-0-2"]
    assert "again in 0 s: as asked" in jobs.output(name)  # the ranks received it, and it does not count as a failure


def test_scancel_is_final(jobs: Jobs, stand_in: str) -> None:
    job = jobs.submit("canceled", "--nodes=2", MOSA_ROOT=stand_in, EXITS="wait 0")
    jobs.cluster.wait((jobs.run("canceled") / "waiting").exists, 20, "run that waits")
    jobs.cluster.call("scancel", job)
    assert jobs.cluster.wait_for_job(job)["JobState"] == "CANCELLED", jobs.output("canceled")
    jobs.cluster.wait_for_nodes()
    assert jobs.cluster.job(job)["Restarts"] == "0"
    assert "Slurm is ending this job itself; not requeued" in jobs.output("canceled")


def test_without_requeue_the_next_job_of_the_chain_continues(jobs: Jobs, stand_in: str) -> None:
    variables = {"MOSA_ROOT": stand_in, "EXITS": "75 3", "MOSA_MIN_SECONDS": "9" * 12, "MOSA_CHAIN": "a"}
    first = jobs.submit("chained", "--no-requeue", **variables)
    after = [jobs.submit("chained", f"--dependency=afterany:{first}", **variables)]
    after.append(jobs.submit("chained", f"--dependency=afterany:{after[0]}", **variables))
    states = [jobs.cluster.wait_for_job(job)["ExitCode"] for job in (first, *after)]
    assert states == ["75:0", "3:0", "1:0"], jobs.output("chained")
    assert attempts(jobs, "chained") == [
        f"{first}-0-1",
        f"{after[0]}-0-1",
    ]  # after a permanent failure the rest do nothing
    assert "the next job of the chain continues the run" in jobs.output("chained")
    assert "not started again: as the previous job of this chain (as asked)" in jobs.output("chained")


DOCTOR = """#!/bin/sh
[ "$1 $2 $3" = "-m megatron_mosa doctor" ] || exec python "$@"
while [ "$1" != --json ]; do shift; done
[ $SLURMD_NODENAME = n2 ] || { echo '{"bad_nodes": ["n1"]}' > "$2"; exit 1; }
"""


def test_a_node_that_fails_preflight_twice_is_excluded(jobs: Jobs, stand_in: str) -> None:
    jobs.cluster.wait_for_nodes()
    doctor = jobs.folder / "doctor"
    doctor.write_text(DOCTOR)
    doctor.chmod(0o755)
    job = jobs.submit("ill", MOSA_ROOT=stand_in, EXITS="0", MOSA_PREFLIGHT="1", MOSA_PYTHON=str(doctor))
    state = jobs.cluster.wait_for_job(job)
    assert (state["JobState"], state["ExcNodeList"], state["NodeList"]) == ("COMPLETED", "n1", "n2"), jobs.output("ill")
    assert (jobs.run("ill") / "attempts").read_text() == f"{job}-1-1 n2\n"
    assert record(jobs, "ill")["preflight_failures"] == {"n1": 2}


def test_a_stop_during_preflight_is_not_a_failure(jobs: Jobs, stand_in: str) -> None:
    doctor = jobs.folder / "asked"
    asked = jobs.folder / "asked-already"
    text = f'[ "$1 $2 $3" = "-m megatron_mosa doctor" ] || exec python "$@"\n[ ! -e {asked} ] || exit 0'
    doctor.write_text(f"#!/bin/sh\n{text}\ntouch {asked}\nexit 75\n")
    doctor.chmod(0o755)
    variables = {"MOSA_ROOT": stand_in, "EXITS": "0", "MOSA_PREFLIGHT": "1", "MOSA_PYTHON": str(doctor)}
    job = jobs.submit("asked", **variables, MOSA_MIN_SECONDS="0")
    assert jobs.cluster.wait_for_job(job)["JobState"] == "COMPLETED", jobs.output("asked")
    assert attempts(jobs, "asked") == [f"{job}-0-2"]
    assert record(jobs, "asked")["failures"] == 0 and record(jobs, "asked")["preflight_failures"] == {}


def test_usage_errors_are_one_line(jobs: Jobs, tmp_path: Path) -> None:
    cases = {
        (): "usage: sbatch",
        ("train.steps=1",): "usage: sbatch",
        ("none.yaml",): "error: ",
        (CONFIG, "train.global_batch_size=9"): "error: world size 1 is not divisible by parallel.tensor_model",
        (CONFIG, *jobs.overrides, "train.global_batch_size=9"): "error: train.global_batch_size=9 must be divisible by",
    }
    for number, (arguments, line) in enumerate(cases.items()):
        output = tmp_path / f"{number}.out"
        command = ["sbatch", "--wait", "--parsable", f"--output={output}", SCRIPT, *arguments]
        done = jobs.cluster.call(*command, **jobs.environment())
        assert done.returncode == 2, output.read_text()
        assert output.read_text().startswith(line) and output.read_text().count("\n") == 1
    command = ["sbatch", "--wait", f"--output={tmp_path}/root.out", SCRIPT, "any.yaml"]
    assert jobs.cluster.call(*command, **jobs.environment(MOSA_ROOT="/none")).returncode == 2
    assert "no pretrain_mosa.py in '/none'" in (tmp_path / "root.out").read_text()
