"""Times every stage of the fused layer, alone and with other tiles: what ``kernels/triton/tiles.py`` is chosen by.

    python -m benchmarks.tune --shape 1 [--stages qkv,out] [--workers 12]

Candidates are compiled in parallel first. A candidate whose result is not that of the present tiles is named and left
out; one that does not fit the card is left out.
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
from benchmarks.timing import measure
from megatron_mosa.kernels.triton import attention, products, selection, tiles

Override = dict[str, int]


def grid(**values: list[int]) -> list[Override]:
    """All combinations."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


MATRIX = grid(ROWS=[64, 128], num_warps=[4, 8], num_stages=[2, 3, 4])
CANDIDATES: dict[str, tuple[str, list[Override]]] = {  # stage: function of tiles.py, what to try
    "qkv": ("gathered", MATRIX),
    "dA": ("gathered", MATRIX),
    "attention": ("attention", grid(BLOCK=[32, 64, 128], num_warps=[4, 8], num_stages=[1, 2])),
    "attention backward": ("attention", grid(BLOCK=[32, 64], num_warps=[4, 8], num_stages=[1, 2])),
    "out": ("scattered", grid(ROWS=[64, 128], COLUMNS=[64, 128, 256], num_warps=[4, 8])),
    "dX": ("scattered", grid(ROWS=[64, 128], COLUMNS=[64, 128, 256], num_warps=[4, 8], num_stages=[2, 3])),
    "dW_O": ("weight_gradient", grid(ROWS=[32, 64, 128], COLUMNS=[64, 128], num_warps=[4, 8], num_stages=[2, 3])),
    "dW_QKV": ("weight_gradient", grid(ROWS=[32, 64], COLUMNS=[64, 128], num_warps=[4, 8], num_stages=[2, 3])),
    "scores": ("", []),
    "selection": ("", []),
    "inverse": ("", []),
}


def stages(shape: Shape, device: str = "cuda") -> dict[str, Callable[[], Any]]:
    """Each stage of one layer as a function without arguments."""
    with torch.no_grad():
        states, router, qkv_weight, proj_weight = (t.detach() for t in layer_inputs(shape, shape.batch, device=device))
        scores = selection.router_scores(states, router)
        indices = selection.select(scores, shape.selected, True)
        inverse = selection.rows_of_tokens(indices, shape.length)
        tables = attention.rotary_table(shape.length, shape.head_dim // 4, 1e4, states.device)
        qkv = products.gathered_product(states, indices, qkv_weight, parts=3)
        saved = attention.attend(qkv, indices, scores, tables, None, False)
        gates = saved[2]
        of_gated = products.gathered_product(states, indices, proj_weight.transpose(1, 2))
        of_qkv, of_logits = attention.attend_backward(qkv, indices, saved, of_gated, tables, None, False, shape.length)
    of_proj, of_qkv_weight, of_router = map(torch.empty_like, (proj_weight, qkv_weight, router))
    k = shape.selected

    def of_weights(values: Tensor, out: Tensor, result: Tensor, **options: Any) -> Tensor:
        products.weight_gradient(states, indices, values, out, **options)
        return result

    return {
        "scores": lambda: selection.router_scores(states, router),
        "selection": lambda: selection.select(scores, k, True),
        "inverse": lambda: selection.rows_of_tokens(indices, shape.length)[1],
        "qkv": lambda: products.gathered_product(states, indices, qkv_weight, parts=3),
        "attention": lambda: attention.attend(qkv, indices, scores, tables, None, False)[0],
        "out": lambda: products.scattered_product(saved[0], proj_weight, inverse, states, k, scale=gates),
        "dA": lambda: products.gathered_product(states, indices, proj_weight.transpose(1, 2)),
        "dW_O": lambda: of_weights(saved[0], of_proj.transpose(1, 2), of_proj, scale=gates),
        "attention backward": lambda: attention.attend_backward(
            qkv, indices, saved, of_gated, tables, None, False, shape.length
        )[0],
        "dW_QKV": lambda: of_weights(
            of_qkv, of_qkv_weight, of_qkv_weight, parts=3, extra=of_logits, extra_output=of_router
        ),
        "dX": lambda: products.scattered_product(
            of_qkv, qkv_weight.transpose(1, 2), inverse, states, k, extra=(of_logits, router)
        ),
    }


@contextmanager
def overridden(function: str, override: Override) -> Iterator[None]:
    """With other tiles."""
    chosen = getattr(tiles, function)
    with mock.patch.object(tiles, function, lambda *args: chosen(*args) | override):
        yield


def precompile(job: tuple[Shape, str, list[Override]]) -> None:
    """Fill Triton's cache, on a shape of one sequence."""
    shape, stage, overrides = job
    run = stages(replace(shape, batch=1))[stage]
    for override in overrides:
        try:
            with overridden(CANDIDATES[stage][0], override):
                run()
                torch.cuda.synchronize()
        except Exception as error:  # does not fit the card; the measurement will name it
            print(f"{stage} {override}: {type(error).__name__}", flush=True)


def tune(stage: str, run: Callable[[], Tensor]) -> str:
    """A line: the present time, and the best others."""
    function, overrides = CANDIDATES[stage]
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
    best = "  ".join(f"{time:.3f} {override}" for time, override in sorted(found, key=lambda pair: pair[0])[:3])
    return f"{stage:20} {present:8.3f} ms   best: {best}"


def main(
    shape: Annotated[int, typer.Option(help="1 to 6")] = 1,
    only: Annotated[str, typer.Option("--stages", help="names, separated by commas; none: all")] = "",
    workers: Annotated[int, typer.Option(help="processes that compile; 0: none")] = 12,
) -> None:
    """Print a line for each stage."""
    chosen = SHAPES[shape - 1]
    names = [name for name in CANDIDATES if not only or name in only.split(",")]
    if workers:
        jobs = [
            (chosen, name, overrides)
            for name in names
            for overrides in (CANDIDATES[name][1][first : first + 4] for first in range(0, len(CANDIDATES[name][1]), 4))
        ]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(pool.map(precompile, jobs))
    print(f"{torch.cuda.get_device_name()}: shape {shape}: {chosen}", flush=True)
    runs, total = stages(chosen), 0.0
    for name in names:
        line = tune(name, runs[name])
        total += float(line[20:].split()[0])
        print(line, flush=True)
    print(f"{'sum':20} {total:8.3f} ms")


if __name__ == "__main__":
    typer.run(main)
