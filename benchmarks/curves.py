"""Loss curves of training with the kernels and with the naive path: the quickstart model, one process, one GPU.

    python -m benchmarks.curves [--steps 200] [--precision bf16] [--output benchmarks/results]

Both train with the same seed, and the naive path also with another seed: the distance between two seeds is the noise to
compare with. Writes a Markdown table, the losses as JSON, and a plot.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from benchmarks.mosa_layer import facts
from benchmarks.timing import require_gpu

matplotlib.use("Agg")

ROOT = Path(__file__).parents[1]
RUNS = {"naive": ("naive", 1234), "triton": ("triton", 1234), "naive, another seed": ("naive", 4321)}
TAIL = 50  # steps at the end, over which to average


def losses(backend: str, seed: int, steps: int, precision: str, directory: Path) -> list[float]:
    """Train once, and return the training losses."""
    name = f"curve-{backend}-{seed}-{precision}"
    command = [sys.executable, str(ROOT / "pretrain_mosa.py"), str(ROOT / "configs" / "quickstart.yaml")]
    command += [
        f"run.name={name}", f"run.directory={directory}", f"run.seed={seed}", f"mosa.backend={backend}",
        f"train.precision={precision}", f"train.steps={steps}", "parallel.tensor_model_parallel_size=1",
        "logging.interval=1", "checkpoint.resume=never",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [
        json.loads(line) for line in (directory / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [record["loss"] for record in records if "loss" in record]


def table(curves: dict[str, list[float]]) -> str:
    """Return the distances of the curves to that of the naive path, as Markdown."""
    naive = curves["naive"]
    lines = [
        "| run | mean loss at the end | largest distance from naive | mean distance |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, curve in curves.items():
        distances = [abs(a - b) for a, b in zip(curve, naive, strict=True)]
        lines.append(
            f"| {name} | {statistics.mean(curve[-TAIL:]):.4f} | {max(distances):.4f} | "
            f"{statistics.mean(distances):.5f} |"
        )
    return "\n".join(lines)


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """Plot all curves over the steps."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for name, curve in curves.items():
        axis.plot(range(1, len(curve) + 1), curve, label=name, linewidth=1)
    axis.set(xlabel="step", ylabel="training loss, nats per token")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(
    steps: Annotated[int, typer.Option(help="steps of each run")] = 200,
    precision: Annotated[str, typer.Option(help="bf16 or fp32")] = "bf16",
    output: Annotated[Path, typer.Option(help="directory for the results")] = Path("benchmarks/results"),
    directory: Annotated[Path, typer.Option(help="directory for the runs")] = Path("runs"),
) -> None:
    """Train three times, and compare the losses."""
    require_gpu()
    with ThreadPoolExecutor() as pool:  # concurrently, because only losses are compared, not times
        runs = {name: pool.submit(losses, *which, steps, precision, directory) for name, which in RUNS.items()}
        curves = {name: run.result() for name, run in runs.items()}
    about = facts(f"python -m benchmarks.curves --steps {steps} --precision {precision}")
    text = f"# Training on both backends, {precision}, on {about['card']}\n\n{json.dumps(about)}\n\n{table(curves)}\n"
    output.mkdir(parents=True, exist_ok=True)
    stem = f"curves-{precision}-{about['card'].replace(' ', '_')}-{about['date'][:10]}"
    (output / f"{stem}.json").write_text(json.dumps(about | {"losses": curves}) + "\n", encoding="utf-8")
    (output / f"{stem}.md").write_text(text, encoding="utf-8")
    plot(curves, output / f"{stem}.png")
    print(text)


if __name__ == "__main__":
    typer.run(main)
