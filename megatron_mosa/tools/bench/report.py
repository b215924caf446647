"""A measurement as text and as a picture, and how it compares with an earlier one."""

from __future__ import annotations

from pathlib import Path

from megatron_mosa.metrics import load_pyplot, save_figure
from megatron_mosa.tools.bench.loop import LoopTime
from megatron_mosa.tools.bench.measurement import Measurement
from megatron_mosa.utils import counted

SLOWER = 0.05  # of a step, from where on it is reported


def text(found: Measurement) -> str:
    """Return the report that is printed."""
    times = sorted(found.milliseconds)
    lines = [
        f"{found.name}: {found.parameters / 1e6:,.1f} M parameters, {found.layout}, on {found.device}",
        found.acceleration,
        f"step     {found.median:,.1f} ms (median of {len(times)}; {times[0]:,.1f} to {times[-1]:,.1f})",
        f"tokens/s {found.tokens_per_second:,.0f}",
        f"MFU      {100 * found.mfu():.1f} % of {found.peak_flops / 1e12:,.3g} TFLOP/s a rank; "
        f"{100 * found.mfu('usual'):.1f} % by the usual rule (attention in full, embedding counted)",
    ]
    if found.reserved_gib:
        lines.append(f"memory   {found.allocated_gib:.1f} GiB allocated at the peak, {found.reserved_gib:.1f} reserved")
    seconds = ", ".join(f"{value:.1f}" for value in found.seconds_of_first_steps)
    lines.append(f"start    {found.seconds_to_build:.1f} s to build the engine; the first steps took {seconds} s")
    if found.loop is not None:
        loop = LoopTime(**found.loop)
        lines.append(
            f"in a run {100 * loop.share:.1f} % of a step is not training: {loop.loading:.1f} ms of waiting for data, "
            f"{loop.between:.1f} between steps; a step that logs takes {loop.logging:.1f} ms longer"
        )
    if found.profile is not None:
        lines += ["", *_table(found)]
    return "\n".join(lines)


def _table(found: Measurement) -> list[str]:
    assert found.profile is not None
    parts = time_by_kind(found)
    rows = [f"{kind:18} {value:9.1f} {100 * value / found.median:6.1f} %" for kind, value in parts.items() if value]
    return [
        f"{'GPU time':18} {'ms':>9} {'of step':>8}",
        *rows,
        f"{counted(found.profile['kernels'], 'kernel')}, "
        f"{counted(found.profile['host_calls'], 'call')} from the host a step",
    ]


def time_by_kind(found: Measurement) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel, largest first, then what is left: idle. Empty without a profile."""
    if found.profile is None:
        return {}
    kinds = dict(sorted(found.profile["kinds"].items(), key=lambda item: -item[1]))
    return kinds | {"idle": max(0.0, found.median - found.profile["busy"])}


def plot(found: Measurement, path: Path) -> None:
    """Write a bar of the step's time by kind, as a PNG."""
    plt = load_pyplot()
    figure, axes = plt.subplots(figsize=(9, 2.4), layout="constrained")
    left = 0.0
    for number, (kind, value) in enumerate(time_by_kind(found).items()):
        if value:
            color = "lightgrey" if kind == "idle" else f"C{number}"
            axes.barh(0, value, left=left, label=f"{kind} {value:.1f}", color=color)
            left += value
    axes.set_yticks([])
    axes.set_xlabel("milliseconds of a step")
    axes.set_title(f"{found.name}, {found.layout}, {found.device}: {found.median:.1f} ms", fontsize=9)
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    save_figure(figure, path, dpi=150)


def slower(found: Measurement, before: Measurement) -> list[str]:
    """Name what takes longer than in an earlier measurement of the same step, by more than 5 % of a step."""
    lines = []
    if found.median > (1 + SLOWER) * before.median:
        lines.append(f"step: {before.median:.1f} -> {found.median:.1f} ms ({found.median / before.median - 1:+.1%})")
    ours, theirs = time_by_kind(found), time_by_kind(before)
    for kind in ours if theirs else ():
        grown = ours[kind] - theirs.get(kind, 0.0)
        if grown > SLOWER * before.median:
            lines.append(f"{kind}: {theirs.get(kind, 0.0):.1f} -> {ours[kind]:.1f} ms")
    return lines
