"""The verdict of ``mosa doctor``: comparison of the nodes, printed table and JSON file."""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosa.cluster.doctor.node import Finding, Report
from megatron_mosa.utils import counted, table_console, write_atomically

_PACKAGES = ("python", "torch", "CUDA", "NCCL", "megatron-core", "deepspeed", "triton", "apex")
_CLOCK_WARNING_SECONDS, _CLOCK_BAD_SECONDS = 1.0, 60.0


@dataclass(frozen=True)
class Verdict:
    """The result to report: rows of (check, value), findings, nodes to exclude, and all ranks' reports."""

    rows: list[tuple[str, str]]
    findings: list[Finding]
    bad_nodes: list[str]
    reports: list[Report]

    @property
    def is_bad(self) -> bool:
        """Whether the job should not start in this state."""
        return any(finding.is_bad for finding in self.findings)


def judge(reports: list[Report], slow: float) -> Verdict:
    """Compare the ranks; ``reports`` are in rank order, ``slow`` is the factor that makes a GPU slow."""
    findings = [finding for report in reports for finding in report.findings]
    for name in (*_PACKAGES, "driver"):
        findings += compare_versions(name, reports)
    findings += compare_gpus(reports)
    findings += compare_speeds(reports, slow)
    findings += compare_clocks(reports)
    findings += judge_communication(reports)
    nodes = list(dict.fromkeys(report.node for report in reports))
    findings = merge(findings, nodes)
    bad = {node for finding in findings if finding.is_bad for node in finding.nodes}
    return Verdict(_rows(reports), findings, [node for node in nodes if node in bad], reports)


def minority(values: dict[int, Hashable]) -> tuple[Any, list[int]]:
    """Return the most common value and the ranks with another one; in a tie the lowest rank's value wins."""
    counts = Counter(values[rank] for rank in sorted(values))  # most_common breaks ties by first occurrence
    usual = counts.most_common(1)[0][0]
    return usual, [rank for rank in sorted(values) if values[rank] != usual]


def compare_versions(name: str, reports: list[Report]) -> list[Finding]:
    """Find nodes whose version differs from that of most ranks; a different driver is only a warning."""
    values = {report.rank: report.facts[name] for report in reports if name in report.facts}
    if not values:
        return []
    usual, others = minority(values)
    fix = "use one driver on all nodes" if name == "driver" else "use one environment on all nodes (constraints.txt)"
    return [
        Finding(
            name,
            f"{name} {values[rank] or 'is absent'} where most ranks have {usual or 'none'}",
            fix,
            is_bad=name != "driver",
            nodes=(_node(reports, rank),),
        )
        for rank in others
    ]


def compare_gpus(reports: list[Report]) -> list[Finding]:
    """Find nodes with fewer or more GPUs than most (one may have fallen off the bus), or with another type."""
    uuids: dict[str, set[str]] = {}
    names: dict[str, set[str]] = {}
    for report in reports:
        if "gpus" in report.facts:
            uuids.setdefault(report.node, set()).update(gpu["uuid"] for gpu in report.facts["gpus"])
            names.setdefault(report.node, set()).update(gpu["name"] for gpu in report.facts["gpus"])
    if not uuids:
        return []
    nodes = list(uuids)
    usual, others = minority({number: len(uuids[node]) for number, node in enumerate(nodes)})
    findings = [
        Finding(
            "GPUs",
            f"{counted(len(uuids[nodes[number]]), 'GPU')} where most nodes have {usual}",
            "see nvidia-smi and dmesg there, and what the job requested",
            nodes=(nodes[number],),
        )
        for number in others
    ]
    usual, others = minority({number: tuple(sorted(names[node])) for number, node in enumerate(nodes)})
    for number in others:
        if uuids[nodes[number]]:
            what = f"{', '.join(sorted(names[nodes[number]]))} where most nodes have {', '.join(usual) or 'none'}"
            fix = "request one type of GPU: the slowest sets the pace"
            findings.append(Finding("GPUs", what, fix, is_bad=False, nodes=(nodes[number],)))
    return findings


def compare_speeds(reports: list[Report], slow: float) -> list[Finding]:
    """Find devices slower than the median of all by more than the factor ``slow``; for CPUs only a warning.

    An even number of devices uses the upper median, so that the slower of two is found.
    """
    speeds = [(report, speed) for report in reports for speed in report.facts.get("matrix_tflops", [])]
    if not speeds:
        return []
    median = statistics.median_high(speed for _, speed in speeds)
    findings = []
    for report, speed in speeds:
        if speed * slow < median:
            on_gpu = bool(report.facts.get("gpus"))
            fix = "check its clocks and temperature (nvidia-smi -q -d PERFORMANCE), or exclude the node"
            if not on_gpu:
                fix = "see what else runs there; shared CPUs are noisy"
            what = f"rank {report.rank} multiplies matrices at {speed:.3g} TFLOP/s, {median / speed:.1f} times slower "
            what += f"than the median {median:.3g}"
            findings.append(Finding("matrix product", what, fix, is_bad=on_gpu, nodes=(report.node,)))
    return findings


def compare_clocks(reports: list[Report]) -> list[Finding]:
    """Find clocks that are off from rank 0's, or from the median of three or more nodes, as rank 0's may be wrong."""
    offsets = [(r.node, r.facts["clock_offset_s"]) for r in reports if r.facts.get("clock_offset_s") is not None]
    if not offsets:
        return []
    reference = statistics.median_low(offset for _, offset in offsets) if len(offsets) > 2 else 0.0
    return [
        Finding(
            "clock skew",
            f"its clock is {offset - reference:+.1f} s off",
            "synchronize it (chronyc makestep)",
            is_bad=abs(offset - reference) > _CLOCK_BAD_SECONDS,
            nodes=(node,),
        )
        for node, offset in offsets
        if abs(offset - reference) > _CLOCK_WARNING_SECONDS
    ]


def judge_communication(reports: list[Report]) -> list[Finding]:
    """Find nodes whose collectives failed. One failed rank can fail all others; ``merge`` then blames no node."""
    failures = {r.node: r.facts["communication_failure"] for r in reports if "communication_failure" in r.facts}
    if not failures or any(report.stage == "silent" for report in reports):  # a silent rank has its own finding
        return []
    what = "; ".join(f"node {node}: {failure}" for node, failure in list(failures.items())[:4])
    fix = "set NCCL_DEBUG=INFO, check the interfaces (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), try half of the nodes"
    return [Finding("communication", f"ranks cannot communicate ({what})", fix, nodes=(*failures,))]


def merge(findings: Iterable[Finding], nodes: list[str]) -> list[Finding]:
    """Combine equal findings of several nodes; one that all nodes share names none of them.

    Excluding nodes would not help against it.
    """
    where: dict[Finding, dict[str, None]] = {}
    for finding in findings:
        where.setdefault(replace(finding, nodes=()), {}).update(dict.fromkeys(finding.nodes))
    merged = []
    for finding, found in where.items():
        if len(found) == len(nodes) > 1:
            merged.append(replace(finding, what=f"all {len(nodes)} nodes: {finding.what}"))
        else:
            merged.append(replace(finding, nodes=tuple(found)))
    return merged


def lines(finding: Finding) -> list[str]:
    """Return one line per node, or one for the job."""
    kind = "error" if finding.is_bad else "warning"
    return [f"{kind}: node {node}: {finding}" for node in finding.nodes] or [f"{kind}: {finding}"]


def print_errors(verdict: Verdict) -> None:
    """Print the errors, without warnings, on standard error."""
    for finding in verdict.findings:
        if finding.is_bad:
            print("\n".join(lines(finding)), file=sys.stderr)


def print_verdict(verdict: Verdict) -> int:
    """Print the table, warnings and verdict, and errors on standard error; return the exit code."""
    if verdict.rows:
        _print_table(verdict)
        warnings = [line for finding in verdict.findings if not finding.is_bad for line in lines(finding)]
        print("\n".join(warnings + [_summary(verdict)]), flush=True)
    print_errors(verdict)
    return int(verdict.is_bad)


def write_json(verdict: Verdict, path: Path) -> None:
    """Write the verdict as JSON (see ``as_json``); raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(as_json(verdict), indent=2) + "\n")


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Return findings, bad nodes and each rank's facts as JSON values; key names carry the units."""
    return {
        "is_bad": verdict.is_bad,
        "bad_nodes": verdict.bad_nodes,
        "findings": [asdict(finding) for finding in verdict.findings],
        "ranks": [asdict(report) for report in verdict.reports],
    }


def _summary(verdict: Verdict) -> str:
    nodes = len({report.node for report in verdict.reports})
    size = f"{counted(nodes, 'node')}, {counted(len(verdict.reports), 'rank')}"
    warnings = sum(not finding.is_bad for finding in verdict.findings)
    if verdict.bad_nodes:
        return f"verdict: bad ({size}): {', '.join(verdict.bad_nodes)}"
    if verdict.is_bad:
        return f"verdict: bad ({size}), no single node is at fault"
    return f"verdict: healthy ({size}, {counted(warnings, 'warning')})"


def _print_table(verdict: Verdict) -> None:
    from rich.table import Table

    table = Table()
    for column in ("check", "found", "state"):
        table.add_column(column)
    for check, value in verdict.rows:
        found = [finding for finding in verdict.findings if finding.check == check]
        state = "ok" if value != "-" else "-"
        if found:
            state = "bad" if any(finding.is_bad for finding in found) else "warning"
            nodes = list(dict.fromkeys(node for finding in found for node in finding.nodes))
            state += f": {', '.join(nodes[:4])}{' ...' * (len(nodes) > 4)}" if nodes else ""
        table.add_row(check, value, state)
    table_console(highlight=False).print(table)


def _rows(reports: list[Report]) -> list[tuple[str, str]]:
    """Return (check, value) in the order of the checks."""
    facts = [report.facts for report in reports]

    def spread(name: str, form: str, scale: Callable[[Any], Any] = float) -> str:
        values = [scale(value) for fact in facts for value in _as_list(fact.get(name))]
        if not values:
            return "-"
        low, high = (form.format(value) for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    rows = []
    for name in (*_PACKAGES, "driver"):
        values: dict[int, Hashable] = {r.rank: r.facts[name] for r in reports if name in r.facts}
        rows.append((name, (minority(values)[0] or "none") if values else "-"))
    rows.append(("GPUs", _gpus(facts)))
    rows.append(("matrix product", spread("matrix_tflops", "{:.3g} TFLOP/s")))
    rows.append(("run directory", "writable" if any("write_mib_s" in fact for fact in facts) else "-"))
    rows.append(("free space", spread("free_gib", "{:.0f} GiB")))
    rows.append(("write speed", spread("write_mib_s", "{:.0f} MiB/s")))
    rows.append(("temporary folder", ", ".join(sorted({fact["temporary"] for fact in facts if "temporary" in fact}))))
    rows.append(("open files", spread("open_files", "{:.0f}")))
    rows.append(("clock skew", spread("clock_offset_s", "{:.4f} s", abs) if len(reports) > 1 else "-"))
    for name in ("all-reduce", "all-gather"):
        backend = next((fact["backend"] for fact in facts if "backend" in fact), "")
        value = spread(name, "{:.3g} GB/s")
        rows.append((name, value if value == "-" else f"{value} over {backend}"))
    # Findings without a row of their own, such as a check that failed unexpectedly.
    rows += [(check, "-") for check in _checks(reports) - {name for name, _ in rows}]
    return rows


def _checks(reports: list[Report]) -> set[str]:
    return {finding.check for report in reports for finding in report.findings}


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _gpus(facts: list[dict[str, Any]]) -> str:
    seen = {gpu["uuid"]: gpu["name"] for fact in facts for gpu in fact.get("gpus", [])}
    measured = [gpu for fact in facts for gpu in fact.get("gpus", []) if "free_gib" in gpu]
    text = ", ".join(f"{count} x {name}" for name, count in Counter(seen.values()).items()) or "none"
    if measured:
        free, total = (min(gpu[key] for gpu in measured) for key in ("free_gib", "total_gib"))
        text += f", {free:.1f} of {total:.1f} GiB free"
    return text


def _node(reports: list[Report], rank: int) -> str:
    return next(report.node for report in reports if report.rank == rank)
