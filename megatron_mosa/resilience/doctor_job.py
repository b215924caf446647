"""``mosa doctor`` over the ranks of a job: they meet, look at their nodes, communicate, and rank 0 tells.

Every wait has an end, and what hangs is known by name.
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

from megatron_mosa.resilience import doctor_node as node_checks
from megatron_mosa.resilience.doctor import Settings
from megatron_mosa.resilience.doctor_meeting import GRACE_SECONDS, Job, absence, absent_nodes
from megatron_mosa.resilience.doctor_node import Finding, Report, import_quietly, node_name, parallel_module, run_check
from megatron_mosa.resilience.doctor_verdict import Verdict, judge, print_errors, print_verdict, write_json


def examine_job(settings: Settings) -> int:
    """Look at this process's node and, in a job, at all; rank 0 prints. Return the exit code, 0 or 1, on every rank.

    Raises:
        UserError: a launcher's variables that make no sense.
        RunError: rank 0 cannot be reached; rank 0 itself reports instead.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # we say what failed; it is read as torch loads
    rank, world_size, local_rank = parallel_module("launch").launch_environment()
    try:
        import_quietly("torch")
    except Exception:
        return _tell_without_torch(rank, local_rank, settings)
    started = time.monotonic()  # now: importing torch on many nodes at once takes what it takes
    job = Job(rank, world_size, started + settings.timeout)
    code, is_stuck = _examine(job, settings, started)
    job.leave()
    if is_stuck:  # in a thread that does not return: leaving in good order would wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _tell_without_torch(rank: int, local_rank: int, settings: Settings) -> int:
    """A node without torch has nothing to meet the others with, and tells for itself; they will miss it."""
    report = Report(rank, node_name())
    run_check(report, "versions", node_checks.check_versions)
    run_check(report, "open files", node_checks.check_limits)
    verdict = judge([report], settings.slow)
    if rank == 0:
        _publish(verdict, settings)
    elif local_rank == 0:
        print_errors(verdict)
    return 1


def _examine(job: Job, settings: Settings, started: float) -> tuple[int, bool]:
    """Exit code, and whether something of this process may hang in a thread."""
    job.send("here", node_name())
    folder = _RunDirectory(settings.run_directory)
    if job.rank == 0:
        here = job.collect("here", started + settings.timeout)
        if len(here) < job.world_size:
            verdict = Verdict([], [absence(job, here, settings.timeout)], absent_nodes(here), [])
            job.announce("roster", None)
            return _publish(verdict, settings), False
        _within(settings.timeout, folder.open)  # where it hangs, so does the check of this node
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


def _look(report: Report, nodes: list[str], token: str | None, settings: Settings) -> bool:
    """Run the checks of this node; return whether one hangs."""
    on_node = [rank for rank, node in enumerate(nodes) if node == report.node]
    position = on_node.index(report.rank)

    def look() -> None:
        run_check(report, "versions", node_checks.check_versions)
        if report.facts["torch"] is not None:
            run_check(report, "GPUs", node_checks.check_gpus, position, len(on_node))
        run_check(report, "open files", node_checks.check_limits)
        if position == 0:  # one a node
            arguments = (settings.run_directory, token, settings.minimum_disk)
            run_check(report, "run directory", node_checks.check_directory, *arguments)
        report.stage = "done"

    hangs = _within(settings.timeout, look) is not None
    if hangs:
        what = f"the check of {report.stage} did not end within {settings.timeout:g} s"
        report.add(report.stage, what, "this part of the node hangs: see dmesg; exclude the node, or raise --timeout")
    return hangs


def _communicate(job: Job, report: Report, nodes: list[str], plan: str, settings: Settings) -> bool:
    """Run the collectives over what the plan says; return whether they hang. How they failed goes into the facts."""
    import torch
    from torch.distributed import PrefixStore

    from megatron_mosa.resilience.doctor_collectives import check_collectives

    assert job.store is not None
    store = PrefixStore("collectives", job.store)
    device = torch.device("cpu")
    if plan == "nccl":
        device = torch.device("cuda", _gpu_index(report, nodes))
    # Torch's own timeout, which ends the process, comes after ours.
    failure = _within(
        settings.timeout,
        lambda: check_collectives(report, store, job.world_size, device, nodes, 2 * settings.timeout),
    )
    if failure is not None:
        report.facts["communication_failure"] = f"{report.stage} {failure}"
    return failure is not None


def _gpu_index(report: Report, nodes: list[str]) -> int:
    """The GPU of this rank, as ``parallel.initialize_parallel`` chooses it."""
    return nodes[: report.rank].count(report.node) % len(report.facts["gpus"])


def _plan(reports: list[Report]) -> str | None:
    """What the ranks communicate over, "nccl" or "gloo"; None: not at all, as they are not all there and sound."""
    if len(reports) == 1 or any(report.stage != "done" or not report.facts.get("torch") for report in reports):
        return None
    nodes = [report.node for report in reports]
    if not all(report.facts.get("gpus") for report in reports):
        return "gloo"
    cards = {report.facts["gpus"][_gpu_index(report, nodes)]["uuid"] for report in reports}
    return "nccl" if len(cards) == len(reports) else "gloo"  # NCCL wants a card for each rank


def _collect_reports(job: Job, name: str, nodes: list[str], timeout: float) -> dict[int, Report]:
    """All ranks' reports; of those that sent none, that they did not."""
    found = job.collect(name, time.monotonic() + timeout + GRACE_SECONDS)
    reports = {}
    for rank, node in enumerate(nodes):
        if rank in found:
            findings = [Finding(**{**finding, "nodes": (node,)}) for finding in found[rank].pop("findings")]
            reports[rank] = Report(**found[rank], findings=findings)
        else:
            reports[rank] = Report(rank, node, stage="silent")
            reports[rank].add(
                "answer", f"rank {rank} came, and then no more was heard of it", "see its output and the node's dmesg"
            )
    return reports


def _publish(verdict: Verdict, settings: Settings) -> int:
    """Tell, and write the JSON file; return the exit code."""
    code = print_verdict(verdict)
    path = settings.json
    if path is not None:
        failure = _within(settings.timeout, lambda: write_json(verdict, path))
        if failure is not None:
            what = f"writing --json={path} {failure}; name a file in a folder that can be written"
            print(f"error: {what}", file=sys.stderr)
            code = 1
    return code


def _within(seconds: float, action: Callable[[], None]) -> str | None:
    """Run in a thread, so that what never returns does not keep us; return what went wrong, if anything."""
    failures: list[str] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            failures.append(f"failed ({(str(error).splitlines() or [type(error).__name__])[0]})")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"did not end within {seconds:g} s"
    return failures[0] if failures else None


class _RunDirectory:
    """The run directory as rank 0 finds or makes it; what it made is removed in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, None
        self.made: list[Path] = []

    def open(self) -> None:
        """Make the folder and a file in it, by which others see that theirs is the same; on failure no token."""
        with suppress(OSError):  # the check of rank 0's node will say so
            missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self.made = missing
            token = f".doctor-{uuid.uuid4().hex}"
            (self.folder / token).touch()
            self.token = token

    def close(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):
            if self.token:
                (self.folder / self.token).unlink()
            for path in self.made:
                path.rmdir()
