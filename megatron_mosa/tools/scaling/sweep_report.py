"""The report of a sweep: results.csv, results.md, scaling.png and breakdown.png."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from megatron_mosa.tools.scaling.rows import NOT_PERFORMANCE, Row, Sweep
from megatron_mosa.tools.scaling.sweep_checks import NORM_TOLERANCE, TOLERANCE
from megatron_mosa.tools.scaling.sweep_plots import plot_breakdown, plot_scaling
from megatron_mosa.utils import usable_processors, write_atomically


def write_report(sweep: Sweep, folder: Path) -> list[str]:
    """Write the report into ``folder``; return the names of its files."""
    _write_csv(sweep, folder / "results.csv")
    write_atomically(folder / "results.md", markdown(sweep))
    written = ["results.md", "results.csv"]
    if any(row.is_measured for row in sweep.rows):
        plot_scaling(sweep, folder / "scaling.png")
        plot_breakdown(sweep, folder / "breakdown.png")
        written += ["scaling.png", "breakdown.png"]
    return written


def _write_csv(sweep: Sweep, path: Path) -> None:
    names = [entry.name for entry in fields(Row) if entry.name != "kinds"]
    kinds = list(dict.fromkeys(kind for row in sweep.rows for kind in row.kinds))
    columns = {kind: f"ms_{kind.replace(' ', '_').lower()}" for kind in kinds}
    content = io.StringIO(newline="")
    # The note is in every line, because tables get cut up and pasted elsewhere.
    writer = csv.DictWriter(content, [*names, *columns.values(), "note"])
    writer.writeheader()
    for row in sweep.rows:
        values = asdict(row)
        times = {columns[kind]: value for kind, value in values.pop("kinds").items()}
        writer.writerow(values | times | {"note": NOT_PERFORMANCE if sweep.device == "cpu" else ""})
    write_atomically(path, content.getvalue())


def setting(sweep: Sweep) -> str:
    """Return the devices and backend; on CPUs with a note that the numbers do not measure performance."""
    counts = sorted({row.processes for row in sweep.rows})
    count = ", ".join(map(str, counts[:-1])) + (" and " if counts[1:] else "") + str(counts[-1])
    if sweep.device == "cpu":
        return f"{count} x CPU (gloo); **{NOT_PERFORMANCE}: ranks share {usable_processors()} cores**"
    return f"{count} x {sweep.cards} (nccl)"


def markdown(sweep: Sweep) -> str:
    """Return the tables with everything needed to read them and to reproduce them."""
    versions = ", ".join(f"{name} {version}" for name, version in sweep.versions.items())
    batch = f"Global batch {sweep.global_batch} x {sweep.sequence_length} tokens"
    if sweep.weak:
        batch += f", and {sweep.weak} x {sweep.sequence_length} per process (weak scaling)"
    lines = [
        f"# Layouts of {sweep.name}",
        "",
        f"{setting(sweep)}. Python {platform.python_version()}, {versions}.",
        f"{batch}, {sweep.precision}{', random tokens' if sweep.random_tokens else ''}. Measured by:",
        "",
        f"    {sweep.command}",
        "",
        *_results_table(sweep),
        "",
        *_legend(sweep),
        "",
        *_kinds_table(sweep),
    ]
    for path, other in sweep.beside:
        lines += ["", *_beside_table(sweep, path, other)]
    return "\n".join(lines) + "\n"


def _results_table(sweep: Sweep) -> list[str]:
    titles = ["layout", "ranks", "batch", "tokens/s per rank", "efficiency"]
    titles += ["weak eff."] * bool(sweep.weak)
    titles += ["MFU", "s/step", "peak memory, GiB"]
    is_reserved = any(row.reserved_memory_gib for row in sweep.rows)
    titles += ["reserved"] * is_reserved
    titles += ["communication", "loss dev.", "norm dev."]
    lines = [_line(titles), _line(["---", *["---:"] * (len(titles) - 1)])]
    for row in sweep.rows:
        name = f"{row.cell.layout}{', fp32' if row.fp32 else ''}"
        if row.status == "reference":
            name = f"reference: {name}"
        if sweep.is_mixed and row.device:
            name += f" ({row.device})"
        start = [name, str(row.processes), str(row.global_batch)]
        if not row.is_measured:
            reason = row.reason.replace("|", "\\|")
            lines.append(_line([*start, f"{row.status}: {reason}", *[""] * (len(titles) - 4)]))
            continue
        cells = [f"{row.tokens_per_second_per_rank:,.0f}", _percent(row.strong_efficiency)]
        cells += [_percent(row.weak_efficiency)] * bool(sweep.weak)
        cells += [_percent(row.mfu), f"{row.step_seconds:.3g}", f"{row.peak_memory_gib:.2f}"]
        cells += ["" if row.reserved_memory_gib is None else f"{row.reserved_memory_gib:.2f}"] * is_reserved
        cells += [_percent(row.communication_share)]
        cells += ["" if value is None else f"{value:.1e}" for value in (row.loss_deviation, row.grad_norm_deviation)]
        lines.append(_line([*start, *cells]))
    return lines


def _legend(sweep: Sweep) -> list[str]:
    loss, norm = TOLERANCE[sweep.precision], NORM_TOLERANCE[sweep.precision]
    lines = [
        "Efficiency: tokens/s per rank as a share of the fastest layout's on the fewest processes.",
        "Communication: share of the step during which a collective was running, including waiting for other ranks.",
        "Deviations of loss and gradient norm: largest relative difference over all steps from the reference "
        f"(tolerances: loss {loss:g}, norm {norm:g}).",
    ]
    if sweep.device == "cpu":
        lines.insert(2, "Memory: peak resident size of a process.")
    elif any(row.reserved_memory_gib for row in sweep.rows):
        lines.insert(2, "Reserved: what torch took of a card, with the memory of CUDA graphs; what a card must have.")
    if sweep.is_mixed:
        lines.insert(
            0, "**Measured on cards of several kinds**: compare only rows of the same one, as efficiency does."
        )
    if any(row.status == "missing" for row in sweep.rows):
        lines.append("Run the command again to measure what is missing.")
    return lines


def _kinds_table(sweep: Sweep) -> list[str]:
    """Milliseconds of a step by kind, as ``mosa bench`` prints them."""
    rows = [row for row in sweep.rows if row.kinds]
    kinds = [kind for kind in dict.fromkeys(kind for row in rows for kind in row.kinds) if _largest(rows, kind) >= 0.05]
    if not rows:
        return []
    kinds.sort(key=lambda kind: (kind == "idle", -_largest(rows, kind)))
    lines = [
        "Milliseconds of a step by kind of work, on rank 0. Collectives include waiting for other ranks; they may run "
        "beside other work.",
        "",
        _line(["layout", "ranks", "batch", *kinds, "step"]),
        _line(["---", *["---:"] * (len(kinds) + 3)]),
    ]
    for row in rows:
        values = [f"{row.kinds.get(kind, 0.0):,.1f}" for kind in kinds]
        step = f"{1000 * (row.step_seconds or 0):,.1f}"
        lines.append(_line([str(row.cell.layout), str(row.processes), str(row.global_batch), *values, step]))
    return lines


def _largest(rows: Sequence[Row], kind: str) -> float:
    return max(row.kinds.get(kind, 0.0) for row in rows)


def _beside_table(sweep: Sweep, path: Path, other: Sweep) -> list[str]:
    """Compare tokens/s and efficiency with another card's, for the cells of both."""
    theirs = {row.cell: row for row in other.rows if row.is_measured}
    lines = [
        f"Beside {other.cards} ({path}; {', '.join(f'{name} {text}' for name, text in other.versions.items())}):",
        "",
        _line(["layout", "ranks", "batch", f"tokens/s per rank, {sweep.cards}", other.cards, "ratio"])
        + f" efficiency | on {other.cards} |",
        _line(["---", *["---:"] * 7]),
    ]
    for row in sweep.rows:
        if row.is_measured and row.cell in theirs:
            their = theirs[row.cell]
            ours, others = row.tokens_per_second_per_rank or 0.0, their.tokens_per_second_per_rank or 1.0
            cells = [str(row.cell.layout), str(row.processes), str(row.global_batch), f"{ours:,.0f}", f"{others:,.0f}"]
            cells += [f"{ours / others:.2f}", *(_percent(_best_efficiency(one)) for one in (row, their))]
            lines.append(_line(cells))
    return lines


def _best_efficiency(row: Row) -> float | None:
    return row.strong_efficiency if row.strong_efficiency is not None else row.weak_efficiency


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.{1 if share < 0.1 else 0}f} %"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
