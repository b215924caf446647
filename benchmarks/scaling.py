"""Growth of the cost of MoSA heads with T (at fixed k and at fixed rho), with rho, and with E.

    python -m benchmarks.scaling [--output benchmarks/results]

Forward and backward in bf16. Each series begins with the check of ``benchmarks.mosa_layer`` on its first shape, and is
skipped if that fails. Writes a JSON file, a Markdown table and a log-log plot.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from benchmarks.mosa_layer import check, facts, layer_inputs, release, time_layer
from benchmarks.shapes import Shape
from benchmarks.timing import require_gpu
from megatron_mosa.attention import mosa_attention

matplotlib.use("Agg")

TOKENS = 65_536  # per batch, at every sequence length
BASE = Shape(64, 1024, 1024, 64, 16, 64)
LENGTHS = [1024, 2048, 4096, 8192, 16_384, 32_768, 65_536]
SERIES: dict[str, list[tuple[float, Shape]]] = {
    "T, k = 64": [(t, replace(BASE, length=t, batch=TOKENS // t, sparsity=t / 64)) for t in LENGTHS],
    "T, rho = 64": [(t, replace(BASE, length=t, batch=TOKENS // t, sparsity=64)) for t in LENGTHS],
    "rho, T = 4096": [
        (rho, replace(BASE, length=4096, batch=16, sparsity=rho)) for rho in (2, 4, 8, 16, 32, 64, 128, 256)
    ],
    "E, T = 1024": [(heads, replace(BASE, heads=heads)) for heads in (1, 4, 16, 64, 256)],
}


def measure_series(points: list[tuple[float, Shape]]) -> list[dict[str, Any]]:
    """Return for each point the variable, milliseconds and FLOPs (forward and backward), or why it is missing."""
    checked = check(points[0][1])
    if not checked["agrees"]:
        return [{"failed": checked}]
    found = []
    for value, shape in points:
        layer = lambda *inputs, shape=shape: mosa_attention(  # noqa: E731
            *inputs, num_selected=shape.selected, backend="triton"
        )
        measured = time_layer(layer, layer_inputs(shape, shape.batch), seconds=0.2)
        found.append({"value": value, "name": str(shape), "flops": 3 * shape.flops, **measured})
        print(f"{shape}: {measured.get('both', measured)}", flush=True)
        release()
    return found


def plot(series: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot milliseconds over the variable: measured, and expected from the FLOPs at the rate of the slowest point."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(series), figsize=(4 * len(series), 4))
    for axis, (name, points) in zip(axes, series.items(), strict=True):
        points = [point for point in points if "both" in point]
        if not points:
            continue
        values, times = [p["value"] for p in points], [p["both"]["milliseconds"] for p in points]
        axis.loglog(values, times, "o-", label="measured")
        most = max(points, key=lambda point: point["both"]["milliseconds"])
        rate = most["both"]["milliseconds"] / most["flops"]
        axis.loglog(values, [rate * p["flops"] for p in points], "--", label="as FLOPs")
        axis.set(xlabel=name, ylabel="ms, forward and backward")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(output: Annotated[Path, typer.Option(help="directory for the results")] = Path("benchmarks/results")) -> None:
    """Measure all series and write the results."""
    require_gpu()
    about = facts("python -m benchmarks.scaling")
    series = {name: measure_series(points) for name, points in SERIES.items()}
    lines = ["| series | shape | ms | TFLOP/s |", "| --- | --- | ---: | ---: |"]
    for name, points in series.items():
        for point in points:
            if "both" not in point:
                lines.append(f"| {name} | {point.get('name', '')} | {point['failed']} | |")
                continue
            time = point["both"]["milliseconds"]
            lines.append(f"| {name} | {point['name']} | {time:.2f} | {point['flops'] / time / 1e9:.0f} |")
    output.mkdir(parents=True, exist_ok=True)
    stem = f"scaling-{about['card'].replace(' ', '_')}-{about['date'][:10]}"
    (output / f"{stem}.json").write_text(json.dumps(about | {"series": series}, indent=1) + "\n", encoding="utf-8")
    (output / f"{stem}.md").write_text(
        f"# Growth on {about['card']}\n\n{json.dumps(about)}\n\n" + "\n".join(lines) + "\n",
        encoding="utf-8",
    )
    plot(series, output / f"{stem}.png")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
