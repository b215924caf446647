"""Times each stage of the fused layer with the current and other tiles, to choose those in ``kernels/triton/tiles.py``.

    python -m benchmarks.tune --shapes 1 [--present] [--stages qkv,out] [--workers 12]

Candidates are first compiled in parallel. A candidate whose result differs from that of the current tiles is reported
and skipped; one that does not fit the GPU is skipped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor

from benchmarks.mosa_layer import layer_inputs
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import measure, require_gpu
from megatron_mosa.kernels.naive import HISTOGRAM_BINS
from megatron_mosa.kernels.triton import (
    attention,
    attention_backward,
    gathered,
    scattered,
    selection,
    specialized,
    tiles,
    weights,
)
from megatron_mosa.kernels.triton.gathered import Gating, Rotation
from megatron_mosa.kernels.triton.rows import rows_of

Override = dict[str, int]


def grid(**values: list[int]) -> list[Override]:
    """Return all combinations of options."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


ROWS_AND_WARPS = [dict(ROWS=64, num_warps=4), dict(ROWS=128, num_warps=8), dict(ROWS=256, num_warps=8)]
GATHERED = [
    base | more
    for base in ROWS_AND_WARPS
    for more in [*grid(INNER=[64], num_stages=[2, 3, 4]), *grid(INNER=[32], num_stages=[4, 6])]
]
SCATTERED = [
    dict(ROWS=rows, COLUMNS=columns, INNER=inner, PROGRAMS=programs, num_warps=warps, num_stages=stages)
    for rows, columns, inner, programs, warps, stages in [
        (128, 256, 64, 1, 8, 3), (256, 128, 64, 1, 8, 3), (128, 128, 64, 1, 8, 4), (128, 128, 64, 1, 8, 6),
        (128, 128, 64, 2, 8, 2), (128, 128, 64, 2, 8, 4), (128, 128, 64, 2, 4, 2), (64, 256, 64, 2, 4, 2),
    ]
]  # fmt: skip
ATTENTION = [
    *grid(BLOCK=[16, 32, 64], num_warps=[1, 2, 4, 8], num_stages=[1, 2]),
    *grid(BLOCK=[64], num_warps=[4], num_stages=[1, 2], maxnreg=[128, 168]),
]
# Without maxnreg, the compiler loads only as many rows at once as a few registers hold.
COMBINE = [
    size | more
    for size in [dict(COLUMNS=columns, num_warps=max(1, columns // 256)) for columns in (128, 256, 512, 1024)]
    for more in [
        *grid(UNROLL=[4, 8], maxnreg=[64, 80, 96, 128]),
        *grid(UNROLL=[16], maxnreg=[80, 96, 128, 168]),
        *grid(UNROLL=[32], maxnreg=[96, 128, 168]),
    ]
]
CANDIDATES: dict[str, tuple[str, list[Override]]] = {  # stage: function of tiles.py, what to try
    "qkv": ("gathered", GATHERED),
    "dA": ("gathered", GATHERED),
    "attention": ("attention", ATTENTION),
    "attention backward": ("attention", ATTENTION),
    "out": ("", []),
    "dX": ("combine", COMBINE),
    "sum over heads": ("combine", COMBINE),
    "dW_O": ("weight_gradient", grid(ROWS=[64, 128], COLUMNS=[64, 128, 256], num_warps=[4, 8], num_stages=[2, 3])),
    "dW_QKV": ("weight_gradient", grid(ROWS=[32, 64], COLUMNS=[128, 256], num_warps=[4, 8], num_stages=[3, 4])),
    "scores": (
        "scores",
        [*grid(HEADS=[64], num_warps=[4, 8]), *grid(HEADS=[128, 256], TOKENS=[64, 128], num_warps=[8])],
    ),
    "selection": ("selection", grid(maxnreg=[48, 64, 96, 128], num_warps=[1, 4, 8, 16])),
    "rows": ("", []),
    "ragged out": ("scattered", SCATTERED),
    "ragged dX": ("scattered", SCATTERED),
    "above": ("select_above", grid(BLOCK=[512, 1024, 2048], num_warps=[1, 2, 4])),
    "followed": ("follow", grid(BLOCK=[32, 64, 128, 256], num_warps=[1])),
    "counted": ("count_scores", grid(BLOCK=[512, 1024], num_warps=[2, 4, 8])),
}


def stages(shape: Shape, device: str = "cuda") -> dict[str, Callable[[], Any]]:
    """Return each stage of one layer as a function without arguments."""
    k = shape.selected
    with torch.no_grad():
        states, router, qkv_weight, proj_weight = (t.detach() for t in layer_inputs(shape, shape.batch, device=device))
        scores = selection.fused_router_scores(states, router)
        indices = selection.fused_select_tokens(scores, k, True)
        thresholds = scores.gather(-1, scores.topk(k).indices[..., -1:]).mean(0).squeeze(-1)  # a load of about 1 / rho
        histogram = torch.zeros(shape.heads, HISTOGRAM_BINS, dtype=torch.int32, device=device)
        sequences, _ = scattered.chunks_of(indices.shape, states)
        rows = rows_of(indices, shape.length, sequences)
        rotation = Rotation(*attention.rotary_table(shape.length, shape.head_dim // 4, 1e4, states.device), None)
        qkv = gathered.gathered_product(states, rows, qkv_weight, rotation)
        saved = attention.attend(qkv, rows, scores, None)
        gated, log_sums, gates = saved
        gating = Gating(gated, gates, torch.empty_like(gates), gated.new_empty((*gates.shape, gathered.PAIR)))
        dattended = gathered.gathered_product(states, rows, proj_weight.mT, gating=gating)
        back = (qkv, rows, dattended, log_sums, gating.deltas, None, rotation)
        dqkv = attention_backward.attend_backward(*back)
    dw_o, dw_qkv, drouter = map(torch.empty_like, (proj_weight, qkv_weight, router))

    def weight_gradient(values: Tensor, out: Tensor, result: Tensor, **options: Any) -> Tensor:
        weights.weight_gradient(states, rows, values, out, **options)
        return result

    def counted() -> Tensor:
        selection.fused_count_scores(scores, histogram.zero_())
        return histogram

    def out(is_full: bool = True) -> Tensor:
        return scattered.scattered_product(saved[0], proj_weight, rows, states, is_full=is_full)

    def dx(is_full: bool = True) -> Tensor:
        return scattered.scattered_product(dqkv, qkv_weight.mT, rows, states, (gating.dlogits, router), is_full)

    return {
        "scores": lambda: selection.fused_router_scores(states, router),
        "selection": lambda: selection.fused_select_tokens(scores, k, True),
        "rows": lambda: rows_of(indices, shape.length, sequences).entries,
        "qkv": lambda: gathered.gathered_product(states, rows, qkv_weight, rotation),
        "attention": lambda: attention.attend(qkv, rows, scores, None)[0],
        "out": out,
        "dA": lambda: gathered.gathered_product(states, rows, proj_weight.mT, gating=gating),
        "dW_O": lambda: weight_gradient(saved[0], dw_o.mT, dw_o),
        "attention backward": lambda: attention_backward.attend_backward(*back),
        "dW_QKV": lambda: weight_gradient(dqkv, dw_qkv, dw_qkv, parts=3, pairs=gating.dlogits, pair_output=drouter),
        "dX": dx,
        "sum over heads": out,
        "ragged out": lambda: out(False),
        "ragged dX": lambda: dx(False),
        "above": lambda: selection.fused_select_above(scores, thresholds, 2 * k, None),
        "followed": lambda: selection.fused_select_above(scores, thresholds, 2 * k, None, 0.1, k / shape.length),
        "counted": counted,
    }


ALTERNATIVES = ("sum over heads", "ragged out", "ragged dX", "above", "followed", "counted")  # not part of the sum


@contextmanager
def overridden(function: str, override: Override) -> Iterator[None]:
    """Use other tiles in this context."""
    chosen = getattr(tiles, function)
    with (
        mock.patch.object(tiles, function, lambda *args: chosen(*args) | override),
        mock.patch.object(specialized, "ENABLED", specialized.ENABLED and function != "scattered"),  # it has its own
    ):
        yield


def precompile(job: tuple[Shape, str, list[Override]]) -> None:
    """Fill Triton's cache, with a shape of two sequences and few heads of the same divisibility by 16."""
    shape, stage, overrides = job
    run = stages(replace(shape, batch=2, heads=16 + shape.heads % 16))[stage]
    for override in overrides:
        try:
            with overridden(CANDIDATES[stage][0], override):
                run()
                torch.cuda.synchronize()
        except Exception as error:  # does not fit the GPU; the measurement reports it
            print(f"{stage} {override}: {type(error).__name__}", flush=True)


def tune(stage: str, run: Callable[[], Tensor], overrides: list[Override]) -> str:
    """Return a line with the current time and the best alternatives."""
    function = CANDIDATES[stage][0]
    present, expected = measure(run, seconds=0.1).milliseconds, run().clone()
    found: list[tuple[float, Override]] = []
    for override in overrides:
        try:
            with overridden(function, override):
                error = (run().float() - expected.float()).norm() / expected.float().norm()
                if not error < 0.01:
                    print(f"{stage} {override}: relative error {error:.1e}", flush=True)
                    continue
                found.append((measure(run, seconds=0.1).milliseconds, override))
        except Exception:
            continue
    best = "  ".join(
        f"{time:.3f} {','.join(f'{name}={value}' for name, value in override.items())}"
        for time, override in sorted(found, key=lambda pair: pair[0])[:5]
    )
    return f"{stage:20} {present:8.3f} ms   best: {best}"


def main(
    shapes: Annotated[str, typer.Option(help="numbers of shapes, 1 to 6")] = "1",
    only: Annotated[str, typer.Option("--stages", help="comma-separated names; all by default")] = "",
    present: Annotated[bool, typer.Option(help="measure only the current tiles")] = False,
    workers: Annotated[int, typer.Option(help="number of processes that compile; 0 compiles in this one")] = 12,
) -> None:
    """Print a line for each stage."""
    require_gpu()
    names = [name for name in CANDIDATES if not only or name in only.split(",")]
    for number in map(int, shapes.split(",")):
        chosen = SHAPES[number - 1]
        if workers and not present:
            jobs = [
                (chosen, name, overrides[first : first + 4])
                for name, (_, overrides) in CANDIDATES.items()
                if name in names
                for first in range(0, len(overrides), 4)
            ]
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                list(pool.map(precompile, jobs))
        print(f"{torch.cuda.get_device_name()}: shape {number}: {chosen}", flush=True)
        runs, total = stages(chosen), 0.0
        for name in names:
            line = tune(name, runs[name], [] if present else CANDIDATES[name][1])
            total += 0.0 if name in ALTERNATIVES else float(line[20:].split()[0])
            print(line, flush=True)
        print(f"{'sum':20} {total:8.3f} ms", flush=True)
        del runs


if __name__ == "__main__":
    typer.run(main)
