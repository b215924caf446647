"""The MoSA heads of one layer in Triton, against the compiled naive path and compiled dense heads of equal FLOPs.

    python -m benchmarks.mosa_layer [--shapes 1,2,3] [--output benchmarks/results]

Times are GPU times of forward, and of forward and backward, including router and selection. "as called" includes the
launches, where those take longer. "thresholds" selects about as many tokens by thresholds with feedback. A speed is
printed only for kernels whose output and gradients agree with the naive path in fp32, which is checked in the same run.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import Measurement, measure, require_gpu
from megatron_mosa.attention import mosa_attention
from megatron_mosa.kernels import get_backend, naive

BARS = [1.10, 1.25, 1.20, 1.50, 1.65, 1.75]  # allowed time relative to the dense heads, forward and backward
CHECKED_ROWS = 40_000  # over all heads: more than 256 per multiprocessor
PEAK = 780e12  # FLOP/s of a bf16 matrix product, measured on an H200
ROTARY: dict[str, float] = {"rotary_percent": 0.5, "rotary_base": 10000.0}


def layer_inputs(shape: Shape, batch: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> list[Tensor]:
    """Return states and weights of about unit scale: [B, T, h], [E, h], [E, h, 3h'], [E, h', h]."""
    generator = torch.Generator(device).manual_seed(0)
    width, size, heads = shape.width, shape.head_dim, shape.heads
    sizes = ((batch, shape.length, width), (heads, width), (heads, width, 3 * size), (heads, size, width))
    scales = (1.0, width**-0.5, width**-0.5, (size * heads) ** -0.5)
    return [
        (torch.randn(sizes_, device=device, generator=generator) * scale).to(dtype).requires_grad_()
        for sizes_, scale in zip(sizes, scales, strict=True)
    ]


def check(shape: Shape) -> dict[str, Any]:
    """Return the relative errors of output and gradients, of Triton and of the naive path in bf16.

    Uses as many sequences as needed for the kernels to choose the same tiles as for the whole shape.
    """
    inputs = layer_inputs(shape, min(shape.batch, -(-CHECKED_ROWS // (shape.heads * shape.selected))))
    fused = get_backend("triton", inputs[0])
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    indices = naive.select_tokens(naive.router_scores(*exact_inputs[:2]).detach(), shape.selected)
    upstream = torch.randn(inputs[0].shape, device="cuda").bfloat16()

    def run(kernels: Any, tensors: list[Tensor]) -> list[Tensor]:
        scores = kernels.router_scores(*tensors[:2])
        output = kernels.selected_attention(*tensors[:2], scores, indices, *tensors[2:], **ROTARY)
        return [output.detach(), *torch.autograd.grad(output, tensors, upstream.to(tensors[0].dtype))]

    exact = run(naive, exact_inputs)
    errors: dict[str, list[float]] = {}
    for name, kernels in (("triton", fused), ("naive", naive)):
        found = run(kernels, inputs)
        errors[name] = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    overlap = (fused.select_tokens(fused.router_scores(*inputs[:2]), shape.selected) == indices).float().mean().item()
    agrees = all(ours < 2 * theirs for ours, theirs in zip(errors["triton"], errors["naive"], strict=True))
    return {"agrees": agrees and overlap > 0.99, "selection_overlap": overlap, "relative_errors": errors}


def dense_layer(shape: Shape) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return compiled causal attention of as many dense heads as cost the same FLOPs."""
    heads, size, width = shape.dense_heads, shape.head_dim, shape.width
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((shape.batch, shape.length, width), (width, 3 * heads * size), (heads * size, width))
    inputs = [
        (torch.randn(sizes_, device="cuda", generator=generator) * scale).bfloat16().requires_grad_()
        for sizes_, scale in zip(sizes, (1.0, width**-0.5, width**-0.5), strict=True)
    ]

    @torch.compile
    def layer(states: Tensor, qkv_weight: Tensor, proj_weight: Tensor) -> Tensor:
        parts = (states @ qkv_weight).unflatten(-1, (3, heads, size)).unbind(-3)
        query, key, value = (part.transpose(1, 2) for part in parts)  # [B, H, T, h']
        positions = torch.arange(states.shape[1], device=states.device)
        query, key = (naive.apply_rotary(part, positions, **ROTARY) for part in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).flatten(2) @ proj_weight

    return layer, inputs


def threshold_layer(shape: Shape, inputs: list[Tensor]) -> Callable[..., Tensor]:
    """Return heads that select about as many tokens by thresholds, with feedback and a capacity of 1.25."""
    kernels = get_backend("triton", inputs[0])
    with torch.no_grad():
        scores = kernels.router_scores(*inputs[:2])
        least = scores.gather(-1, kernels.select_tokens(scores, shape.selected).long()).amin(-1)  # [B, E]
        thresholds = least.mean(0)
    return lambda *inputs: mosa_attention(
        *inputs,
        thresholds=thresholds,
        capacity=-(-5 * shape.selected // 4),
        feedback=0.1,
        share=1 / shape.sparsity,
        backend="triton",
    )


def time_layer(layer: Callable[..., Tensor], inputs: list[Tensor], seconds: float = 0.5) -> dict[str, Any]:
    """Measure forward, and forward and backward, for some seconds each; or return why that is impossible."""
    upstream = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            layer(*inputs)

    def both() -> None:
        torch.autograd.grad(layer(*inputs), inputs, upstream)

    try:
        measured: list[Measurement] = [measure(forward, seconds=seconds), measure(both, seconds=seconds)]
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    return {"forward": asdict(measured[0]), "both": asdict(measured[1])}


def measure_shape(number: int, shape: Shape) -> dict[str, Any]:
    """Return all measurements of one shape."""
    row: dict[str, Any] = {"number": number, "shape": asdict(shape), "name": str(shape), "flops": shape.flops}
    row["check"] = check(shape)
    release()
    if row["check"]["agrees"]:
        fused = lambda *inputs: mosa_attention(*inputs, num_selected=shape.selected, backend="triton")  # noqa: E731
        inputs = layer_inputs(shape, shape.batch)
        row["triton"] = time_layer(fused, inputs)
        row["threshold"] = time_layer(threshold_layer(shape, inputs), inputs)
        del inputs
        release()
    compiled = torch.compile(
        lambda *inputs: mosa_attention(*inputs, num_selected=shape.selected, backend="naive"), dynamic=False
    )
    row["compiled"] = time_layer(compiled, layer_inputs(shape, shape.batch))
    release()
    row["dense"] = time_layer(*dense_layer(shape))
    release()
    return row


def facts(command: str) -> dict[str, Any]:
    """Return the hardware and software that every result records."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "card": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "command": command,
    }


def release() -> None:
    """Free memory between measurements."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown with milliseconds, as forward / forward and backward."""
    lines = [
        "| shape | Triton, ms | TFLOP/s | share of floor | compiled naive, ms | dense, ms | Triton / dense | bar | "
        "GiB: Triton, compiled | as called, ms: Triton, compiled, dense | thresholds / Triton |",
        "| --- | --- | ---: | ---: | --- | --- | ---: | ---: | --- | --- | ---: |",
    ]
    for row in rows:
        cells = [f"{row['number']}: {row['name']}"]
        ours = row.get("triton", {"failed": f"check failed: {row['check']['relative_errors']}"})
        pairs = {key: _pair(row.get(key, ours)) for key in ("triton", "compiled", "dense")}
        ratio = rate = share = "-"
        if "both" in ours:
            seconds = ours["both"]["milliseconds"] / 1e3
            rate, share = f"{3 * row['flops'] / seconds / 1e12:.0f}", f"{3 * row['flops'] / PEAK / seconds:.0%}"
            if "both" in row["dense"]:
                ratio = f"{ours['both']['milliseconds'] / row['dense']['both']['milliseconds']:.2f}"
        memory = ", ".join(
            f"{part['both']['extra_gib']:.2f}" if "both" in part else "-" for part in (ours, row["compiled"])
        )
        cells += [pairs["triton"], rate, share, pairs["compiled"], pairs["dense"], ratio]
        called = ", ".join(
            f"{part['both']['called_milliseconds']:.2f}" if "both" in part else "-"
            for part in (ours, row["compiled"], row["dense"])
        )
        cells += [f"{BARS[row['number'] - 1]:.2f}", memory, called, _price(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _price(row: dict[str, Any]) -> str:
    """Return how many times as long heads with thresholds take."""
    both = [row.get(key, {}).get("both") for key in ("threshold", "triton")]
    return "-" if None in both else f"{both[0]['milliseconds'] / both[1]['milliseconds']:.2f}"


def _pair(part: dict[str, Any]) -> str:
    if "failed" in part:
        return str(part["failed"])
    return f"{part['forward']['milliseconds']:.2f} / {part['both']['milliseconds']:.2f}"


def main(
    shapes: Annotated[str, typer.Option(help="numbers of shapes, 1 to 6")] = "1,2,3,4,5,6",
    output: Annotated[Path, typer.Option(help="directory for the results")] = Path("benchmarks/results"),
) -> None:
    """Measure; print a table, and write it with all numbers to a dated pair of files."""
    require_gpu()
    numbers = [int(number) for number in shapes.split(",")]
    about = facts(f"python -m benchmarks.mosa_layer --shapes {shapes}")
    rows = []
    for number in numbers:
        rows.append(measure_shape(number, SHAPES[number - 1]))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    text = f"# MoSA layer on {about['card']}\n\n{json.dumps(about)}\n\nbf16; forward / forward and backward.\n\n"
    text += table(rows) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    stem = f"mosa_layer-{about['card'].replace(' ', '_')}-{about['date'][:10]}"
    (output / f"{stem}.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    (output / f"{stem}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
