"""Whole optimizer steps on one GPU: ``python -m benchmarks.step [NAME ...] [--acceleration auto none] [--out FILE]``.

Each case builds the engine from a configuration in its own process, takes steps on random tokens from pinned memory,
and profiles some more. Prints a line per case, and writes all numbers as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parents[1] / "configs"
PEAK = 989e12  # FLOP/s of an H100 in bf16
PROFILED = 3  # number of profiled steps
_1B = ["train.recompute=none", "train.micro_batch_size=4", "train.global_batch_size=16", "data.vocab_size=32000"]
_PAIR = ["train.global_batch_size=64", "train.micro_batch_size=64", "train.recompute=none", "train.deterministic=false"]
_THRESHOLDS = [
    "mosa.selection=threshold", "mosa.threshold_warmup_steps=1", "mosa.load_feedback=0.1", "mosa.capacity_factor=1.25",
]  # fmt: skip
_DENSE = [
    "model.num_layers=24", "model.hidden_size=2048", "model.num_dense_heads=16", "model.head_dim=128",
    "model.normalization=RMSNorm", "model.rotary_percent=1.0", "data.vocab_size=50304", "data.sequence_length=2048",
    "train.micro_batch_size=8", "train.global_batch_size=8", "train.recompute=none", "train.deterministic=false",
]  # fmt: skip


def _pair(size: str, heads: int, sparsity: int, *more: str) -> dict[str, tuple[str, list[str]]]:
    mosa = [f"mosa.num_heads={heads}", f"mosa.sparsity={sparsity}", "model.num_dense_heads=4"]
    return {
        f"{size}_dense": (f"paper/{size}.yaml", [*_PAIR, *more]),
        f"{size}_mosa": (f"paper/{size}.yaml", [*_PAIR, *more, *mosa]),
    }


CASES: dict[str, tuple[str, list[str]]] = {
    "1b_mosa": ("scale/1b_mosa.yaml", _1B),
    "1b_mosa_one": ("scale/1b_mosa.yaml", [*_1B, "train.global_batch_size=4"]),
    "1b_twin": ("scale/1b_mosa.yaml", [*_1B, "mosa.num_heads=0", "model.num_dense_heads=5"]),
    "1b_threshold": ("scale/1b_mosa.yaml", [*_1B, *_THRESHOLDS]),
    "dense_1b4": ("paper/tiny.yaml", _DENSE),
    **_pair("tiny", 17, 32),
    **_pair("small", 14, 32),
    **_pair("medium", 12, 32),
    **_pair("large", 16, 16, "train.micro_batch_size=32"),
}
"""Configuration and overrides of each."""


def measure(name: str, acceleration: str, steps: int, more: list[str]) -> dict[str, Any]:
    """Measure one case, in a process of its own that waits for a line of input before it uses the GPU."""
    from megatron_mosa.config import load_config
    from megatron_mosa.engine import DeepSpeedEngine
    from megatron_mosa.model import model_flops
    from megatron_mosa.parallel import initialize_parallel

    sys.stdin.readline()
    file, overrides = CASES[name]
    config = load_config(CONFIGS / file, [*overrides, f"train.acceleration={acceleration}", *more])
    layout = initialize_parallel(1, config.run.seed)
    begin = time.perf_counter()
    engine = DeepSpeedEngine(config, config.data.vocab_size, layout)
    generator = torch.Generator().manual_seed(0)

    pool = [[_random_batch(config, generator) for _ in range(engine.accumulation_steps)] for _ in range(5)]

    def step() -> tuple[float, float, float]:
        batches = pool[0]
        pool.append(pool.pop(0))
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = engine.train_step(batches, 2.5e-4)
        torch.cuda.synchronize()
        return time.perf_counter() - start, result.loss, result.grad_norm

    built = time.perf_counter() - begin
    first = [step() for _ in range(5)]
    times = [1000 * step()[0] for _ in range(steps)]
    median = statistics.median(times)
    flops = model_flops(config, config.data.vocab_size) * config.train.global_batch_size
    tokens = config.train.global_batch_size * config.data.sequence_length
    return {
        "name": name, "acceleration": acceleration, "chose": str(engine.acceleration), "more": more,
        "milliseconds": median, "lowest": min(times), "highest": max(times), "times": times,
        "tokens_per_second": 1000 * tokens / median,
        "mfu": 1000 * flops / median / PEAK, "losses": [loss for _, loss, _ in first], "norms": [n for *_, n in first],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "seconds_to_build": built, "seconds_of_first_steps": [seconds for seconds, *_ in first], **_profile(step),
        "card": torch.cuda.get_device_name(), "torch": torch.__version__,
    }  # fmt: skip


def _random_batch(config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shape = config.train.micro_batch_size, config.data.sequence_length + 1
    tokens = torch.randint(0, config.data.vocab_size, shape, generator=generator)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(shape[0], shape[1] - 1)}
    return {key: tensor.contiguous().pin_memory() for key, tensor in batch.items()}


KINDS = {
    "optimizer": ("FusedAdam", "fused_adam"),
    "attention": ("flash", "fmha", "cudnn_generated"),
    "MoSA": (
        "_scores_kernel", "_select", "_starts_kernel", "_pack_kernel", "_count_kernel", "_entries_kernel", "_gathered",
        "_forward_kernel", "_backward_", "_scattered", "_combine", "_weight_gradient", "_follow", "_count_scores",
    ),
    "rotary": ("_rotary_kernel",),
    "cross entropy": ("_cross_entropy_kernel",),
    "matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "splitK"),
    "copies": ("copy", "Memcpy", "Memset", "fill"),
    "collectives": ("nccl",),
}  # fmt: skip


def _profile(step: Any) -> dict[str, Any]:
    """Return busy GPU milliseconds per step, calls issued by the host, and kernel time by kind, over three steps."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(3):  # warm up again
        step()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(PROFILED):
            step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    kernels = sorted(
        ((e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in events if "CUDA" in str(e.device_type())),
    )
    kernels = [kernel for kernel in kernels if not kernel[2].startswith(("ProfilerStep", "Optimizer."))]
    busy, end, kinds = 0, 0, dict.fromkeys([*KINDS, "elementwise and other"], 0.0)
    for start, stop, name in kernels:
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
        known = {} if name.startswith("triton_") else KINDS  # Inductor's names list all that they fuse
        found = (kind for kind, words in known.items() if any(word in name for word in words))
        kinds[next(found, "elementwise and other")] += (stop - start) / 1e6 / PROFILED
    issued = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")
    calls = [e.name() for e in events if e.name().startswith("cu") and any(word in e.name() for word in issued)]
    counts = {"kernels": len(kernels) // PROFILED, "host_calls": len(calls) // PROFILED}
    return {"busy": busy / 1e6 / PROFILED, **counts, "by_kind": kinds}


def _line(found: dict[str, Any]) -> str:
    return (
        f"{found['name']:13} {found['acceleration']:5} {found['milliseconds']:7.1f} ms ({found['lowest']:.1f} to "
        f"{found['highest']:.1f}) busy {found['busy']:6.1f} MFU {100 * found['mfu']:4.1f} % "
        f"{found['tokens_per_second'] / 1000:6.1f}k/s {found['peak_gib']:5.1f} {found['reserved_gib']:5.1f} GiB "
        f"{found['host_calls']:6d} calls {found['kernels']:6d} kernels | {found['chose']}"
    )


def main() -> None:
    """Measure each case in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--acceleration", nargs="+", default=["auto", "none"], choices=["auto", "none"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides")
    parser.add_argument("--out", type=Path, default=Path("step.json"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.names[0], options.acceleration[0], options.steps, options.set)))
        return
    cases = [(name, acceleration) for name in options.names for acceleration in options.acceleration]
    processes = [_start(name, acceleration, options) for name, acceleration in cases]  # so that all import concurrently
    results = []
    for (name, acceleration), process in zip(cases, processes, strict=True):
        output, errors = process.communicate("go\n")
        if process.returncode:
            print(f"{name:13} {acceleration:5} failed: {errors[-3000:]}", flush=True)
            continue
        results.append(json.loads(output.splitlines()[-1]))
        print(_line(results[-1]), flush=True)
        options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _start(name: str, acceleration: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step", name, "--here", "--acceleration", acceleration]
    command += ["--steps", str(options.steps), "--set", *options.set]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")


if __name__ == "__main__":
    main()
