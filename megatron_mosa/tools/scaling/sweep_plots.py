"""The pictures of a sweep: efficiency over the number of ranks, and the time of a step by kind of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mosa.metrics import load_pyplot, save_figure
from megatron_mosa.tools.bench.profile import COLLECTIVES
from megatron_mosa.tools.scaling.rows import NOT_PERFORMANCE, Row, Sweep
from megatron_mosa.utils import counted

_IDLE = "idle"


def plot_scaling(sweep: Sweep, path: Path) -> None:
    """Plot tokens/s per rank as a share of the fewest processes', over ranks: a line per layout, one panel per mode."""
    modes = [("strong", f"strong scaling: {counted(sweep.global_batch, 'sample')} a step")]
    if sweep.weak:
        modes.append(("weak", f"weak scaling: {counted(sweep.weak, 'sample')} a step and process"))
    plt = load_pyplot()
    figure, panels = plt.subplots(1, len(modes), figsize=(6.5 * len(modes), 4.5), layout="constrained", squeeze=False)
    for axes, (mode, title) in zip(panels[0], modes, strict=True):
        _plot_lines(axes, sweep, f"{mode}_efficiency", "", "o-")
        for number, (_, other) in enumerate(sweep.beside):
            _plot_lines(axes, other, f"{mode}_efficiency", f" ({other.cards})", ("s--", "^:", "v-.")[number % 3])
        counts = sorted({row.processes for row in sweep.rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, list(map(str, counts)))
        axes.set_xlim(0.9 * counts[0], 1.1 * counts[-1])
        axes.minorticks_off()
        axes.axhline(100, color="gray", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("ranks")
        axes.set_ylabel("tokens/s per rank, % of the fewest ranks'")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.suptitle(_title(sweep), fontsize="medium")
    save_figure(figure, path, dpi=120)


def _plot_lines(axes: Any, sweep: Sweep, attribute: str, suffix: str, style: str) -> None:
    layouts = list(dict.fromkeys(str(row.cell.layout) for row in sweep.rows if not row.fp32))
    for number, layout in enumerate(layouts):
        points = sorted(
            (row.processes, 100 * value)
            for row in sweep.rows
            if str(row.cell.layout) == layout and (value := getattr(row, attribute)) is not None
        )
        if points:
            counts, values = zip(*points, strict=True)
            axes.plot(counts, values, style, color=f"C{number % 10}", label=f"{layout}{suffix}")


def plot_breakdown(sweep: Sweep, path: Path) -> None:
    """Plot a bar per cell: the ranks' time for 1,000 tokens by kind, of collectives only what nothing else ran beside.

    Other kernels that run beside each other share that time, so that a bar is as long as the step.
    Time of all ranks for a number of tokens compares cells of other batches and numbers of ranks: perfect scaling would
    leave a bar as long as that of one rank.
    """
    rows = [row for row in sweep.rows if row.is_measured][::-1]  # barh draws upwards
    bars = [bar_of(row) for row in rows]
    kinds = sorted({kind for bar in bars for kind in bar}, key=lambda kind: (kind == _IDLE, kind == COLLECTIVES, kind))
    names = [_bar_name(row) for row in rows]
    figure, axes = load_pyplot().subplots(figsize=(10, 1.8 + 0.5 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    for number, kind in enumerate(kinds):
        widths = [bar.get(kind, 0.0) for bar in bars]
        if not any(widths):
            continue
        color = "lightgrey" if kind == _IDLE else "black" if kind == COLLECTIVES else f"C{number % 10}"
        label = "exposed collectives" if kind == COLLECTIVES and sweep.device != "cpu" else kind
        axes.barh(range(len(rows)), widths, left=left, color=color, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xlabel("milliseconds x ranks for 1,000 tokens, as on rank 0")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=7, ncols=5, loc="outside lower center")
    figure.suptitle(_title(sweep), fontsize="medium")
    save_figure(figure, path, dpi=120)


def _bar_name(row: Row) -> str:
    ranks = counted(row.processes, "rank")
    return f"{row.cell.layout}{', fp32' if row.fp32 else ''}\n{ranks}, batch {row.global_batch}"


def bar_of(row: Row) -> dict[str, float]:
    """Return the parts of a row's bar, in milliseconds times ranks for 1,000 tokens; together they are the step."""
    parts, seconds = dict(row.kinds), row.step_seconds or 0.0
    if row.exposed_communication_share is not None:
        parts[COLLECTIVES] = 1000 * row.exposed_communication_share * seconds
        kinds = [kind for kind in parts if kind not in (COLLECTIVES, _IDLE)]
        total = sum(parts[kind] for kind in kinds)
        room = 1000 * seconds - parts[COLLECTIVES] - parts.get(_IDLE, 0.0)
        parts |= {kind: parts[kind] * room / total for kind in kinds if total}
    thousands = (row.tokens_per_second_per_rank or 0.0) * seconds / 1000  # of a rank in a step
    return {kind: milliseconds / thousands for kind, milliseconds in parts.items()}


def _title(sweep: Sweep) -> str:
    note = f": {NOT_PERFORMANCE}" if sweep.device == "cpu" else ""
    return f"{sweep.name}, {sweep.precision}, {sweep.cards}{note}"
