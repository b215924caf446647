"""``mosa doctor`` across the ranks of a job: rendezvous, node checks, collectives, and the report of rank 0.

Every wait has a timeout, and the report names whatever hangs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from megatron_mosa.cluster.doctor import node as node_checks
from megatron_mosa.cluster.doctor.meeting import GRACE_SECONDS, Job, absence, absent_nodes
from megatron_mosa.cluster.doctor.node import Finding, Report, import_quietly, node_name, run_check
from megatron_mosa.cluster.doctor.options import DoctorOptions
from megatron_mosa.cluster.doctor.verdict import Verdict, judge, print_errors, print_verdict, write_json
from megatron_mosa.parallel import launch_environment
from megatron_mosa.utils import first_line


def check_job(settings: DoctorOptions) -> int:
    """Check the node of this process or all nodes of its job; return the exit code, 0 or 1, on every rank.

    Only rank 0 prints.

    Raises:
        UserError: the launcher's environment variables are inconsistent.
        RunError: this rank cannot reach rank 0; rank 0 itself reports such failures instead.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read when torch loads; failures are reported here
    rank, world_size, local_rank = launch_environment()
    try:
        import_quietly("torch")
    except Exception:
        return _report_without_torch(rank, local_rank, settings)
    started = time.monotonic()  # only now: importing torch on many nodes at once can take long
    job = Job(rank, world_size, started + settings.timeout)
    code, is_stuck = _examine(job, settings, started)
    job.leave()
    if is_stuck:  # in a thread that does not return: a normal exit would wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _report_without_torch(rank: int, local_rank: int, settings: DoctorOptions) -> int:
    """Report this node alone: without torch it cannot join the others, who report it as missing."""
    report = Report(rank, node_name())
    run_check(report, "versions", node_checks.check_versions)
    run_check(report, "open files", node_checks.check_limits)
    verdict = judge([report], settings.slow)
    if rank == 0:
        _publish(verdict, settings)
    elif local_rank == 0:
        print_errors(verdict)
    return 1


def _examine(job: Job, settings: DoctorOptions, started: float) -> tuple[int, bool]:
    """Return the exit code, and whether a thread of this process may hang."""
    job.send("here", node_name())
    folder = _RunDirectory(settings.run_directory)
    if job.rank == 0:
        here = job.collect("here", started + settings.timeout)
        if len(here) < job.world_size:
            verdict = Verdict([], [absence(job, here, settings.timeout)], absent_nodes(here), [])
            job.announce("roster", None)
            return _publish(verdict, settings), False
        _within(settings.timeout, folder.open)  # if this hangs, so does the check of this node
        job.announce("roster", [[here[rank] for rank in range(job.world_size)], folder.token])
    roster = job.hear("roster", started + 2 * settings.timeout)
    if roster is None:
        return 1, False
    nodes, token = roster
    report = Report(job.rank, nodes[job.rank])
    hangs = _look(report, nodes, token, settings)
    job.send("report", asdict(report))
    reports: dict[int, Report] = {}
    if job.rank == 0:
        reports = _collect_reports(job, "report", nodes, settings.timeout)
        job.announce("plan", _plan(list(reports.values())))
    plan = job.hear("plan", time.monotonic() + 3 * settings.timeout)
    if plan is not None:
        hangs = _communicate(job, report, nodes, plan, settings) or hangs
        job.send("communication", asdict(report))
        if job.rank == 0:
            reports = _collect_reports(job, "communication", nodes, settings.timeout)
    if job.rank == 0:
        _within(settings.timeout, folder.close)
        job.announce("code", _publish(judge(list(reports.values()), settings.slow), settings))
    return job.hear("code", time.monotonic() + 3 * settings.timeout), hangs


def _look(report: Report, nodes: list[str], token: str | None, settings: DoctorOptions) -> bool:
    """Run the checks of this node; return whether one hangs."""
    on_node = [rank for rank, node in enumerate(nodes) if node == report.node]
    position = on_node.index(report.rank)

    def look() -> None:
        run_check(report, "versions", node_checks.check_versions)
        if report.facts["torch"] is not None:
            run_check(report, "GPUs", node_checks.check_gpus, position, len(on_node))
        run_check(report, "open files", node_checks.check_limits)
        if position == 0:  # one per node
            arguments = (settings.run_directory, token, settings.minimum_disk)
            run_check(report, "run directory", node_checks.check_directory, *arguments)
        report.stage = "done"

    hangs = _within(settings.timeout, look) is not None
    if hangs:
        what = f"the check '{report.stage}' did not finish within {settings.timeout:g} s"
        report.add(report.stage, what, "see dmesg for what hangs; exclude the node, or raise --timeout")
    return hangs


def _communicate(job: Job, report: Report, nodes: list[str], plan: str, settings: DoctorOptions) -> bool:
    """Run the collectives on the planned backend; return whether they failed or hang. The facts record how."""
    import torch
    from torch.distributed import PrefixStore

    from megatron_mosa.cluster.doctor.collectives import check_collectives

    assert job.store is not None
    store = PrefixStore("collectives", job.store)
    device = torch.device("cpu")
    if plan == "nccl":
        device = torch.device("cuda", _gpu_index(report, nodes))
    # Torch's own timeout, which ends the process, must be longer than ours.
    failure = _within(
        settings.timeout,
        lambda: check_collectives(report, store, job.world_size, device, nodes, 2 * settings.timeout),
    )
    if failure is not None:
        report.facts["communication_failure"] = f"{report.stage} {failure}"
    return failure is not None


def _gpu_index(report: Report, nodes: list[str]) -> int:
    """Return the index of this rank's GPU, as ``parallel.initialize_parallel`` chooses it."""
    return nodes[: report.rank].count(report.node) % len(report.facts["gpus"])


def _plan(reports: list[Report]) -> str | None:
    """Return the backend to test, "nccl" or "gloo"; None for a single rank, or if some rank's checks did not finish."""
    if len(reports) == 1 or any(report.stage != "done" or not report.facts.get("torch") for report in reports):
        return None
    nodes = [report.node for report in reports]
    if not all(report.facts.get("gpus") for report in reports):
        return "gloo"
    uuids = {report.facts["gpus"][_gpu_index(report, nodes)]["uuid"] for report in reports}
    return "nccl" if len(uuids) == len(reports) else "gloo"  # NCCL needs one GPU per rank


def _collect_reports(job: Job, name: str, nodes: list[str], timeout: float) -> dict[int, Report]:
    """Return all ranks' reports; a rank that sent none gets a finding."""
    found = job.collect(name, time.monotonic() + timeout + GRACE_SECONDS)
    reports = {}
    for rank, node in enumerate(nodes):
        if rank in found:
            findings = [Finding(**{**finding, "nodes": (node,)}) for finding in found[rank].pop("findings")]
            reports[rank] = Report(**found[rank], findings=findings)
        else:
            reports[rank] = Report(rank, node, stage="silent")
            what = f"rank {rank} joined, then stopped responding"
            reports[rank].add("answer", what, "see its output and the node's dmesg")
    return reports


def _publish(verdict: Verdict, settings: DoctorOptions) -> int:
    """Print the verdict and write the JSON file; return the exit code."""
    code = print_verdict(verdict)
    path = settings.json
    if path is not None:
        failure = _within(settings.timeout, lambda: write_json(verdict, path))
        if failure is not None:
            what = f"writing --json={path} {failure}; name a file in a writable directory"
            print(f"error: {what}", file=sys.stderr)
            code = 1
    return code


def _within(seconds: float, action: Callable[[], None]) -> str | None:
    """Run ``action`` in a thread and wait at most ``seconds``; return what went wrong, or None."""
    failures: list[str] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            failures.append(f"failed ({first_line(error)})")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"did not finish within {seconds:g} s"
    return failures[0] if failures else None


class _RunDirectory:
    """The run directory as rank 0 finds or creates it; ``close`` removes what it created."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, None
        self.created: list[Path] = []

    def open(self) -> None:
        """Create the directory and a token file by which other nodes recognize it; on failure, no token."""
        with suppress(OSError):  # the check of rank 0's node reports it
            missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self.created = missing
            token = f".doctor-{uuid.uuid4().hex}"
            (self.folder / token).touch()
            self.token = token

    def close(self) -> None:
        with suppress(OSError):
            if self.token:
                (self.folder / self.token).unlink()
            for path in self.created:
                path.rmdir()
