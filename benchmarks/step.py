"""Whole training steps of fixed cases: ``python -m benchmarks.step [CASE ...] [--out FILE] [--compare FILE]``.

Each case is a configuration and overrides, measured as by ``mosa bench`` in its own process (under torchrun where
it needs several GPUs). Prints a line for each, writes all numbers as JSON, and names what became slower than in an
earlier file of the same card, or why a case cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.timing import require_gpu
from megatron_mosa.tools.bench.measurement import Measurement
from megatron_mosa.tools.bench.report import difference, slower

CONFIGS = Path(__file__).parents[1] / "configs"
PEAK = 989e12  # FLOP/s of an H100 in bf16
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


def _heads(number: int, sparsity: int) -> list[str]:
    return [f"mosa.num_heads={number}", f"mosa.sparsity={sparsity}", "model.num_dense_heads=4"]


def _pair(size: str, heads: int, sparsity: int, *more: str) -> dict[str, tuple[str, list[str]]]:
    return {
        f"{size}_dense": (f"paper/{size}.yaml", [*_PAIR, *more]),
        f"{size}_mosa": (f"paper/{size}.yaml", [*_PAIR, *more, *_heads(heads, sparsity)]),
    }


CASES: dict[str, tuple[str, list[str]]] = {
    "1b_mosa": ("scale/1b_mosa.yaml", _1B),
    "1b_mosa_one": ("scale/1b_mosa.yaml", [*_1B, "train.global_batch_size=4"]),
    "1b_twin": ("scale/1b_mosa.yaml", [*_1B, "mosa.num_heads=0", "model.num_dense_heads=5"]),
    "1b_128k": ("scale/1b_mosa.yaml", [*_1B, "data.vocab_size=128000"]),
    "first_gpu_run": ("first_gpu_run.yaml", ["data.vocab_size=8000"]),
    "1b_threshold": ("scale/1b_mosa.yaml", [*_1B, *_THRESHOLDS]),
    "dense_1b4": ("paper/tiny.yaml", _DENSE),
    **_pair("tiny", 17, 32),
    **_pair("small", 14, 32),
    **_pair("medium", 12, 32),
    **_pair("large", 16, 16, "train.micro_batch_size=32"),
    "tiny_equal_flops": ("paper/tiny.yaml", [*_PAIR, *_heads(276, 32)]),
    "small_equal_flops": ("paper/small.yaml", [*_PAIR, *_heads(210, 32)]),
}
"""Configuration and overrides of each; pairs have equal perplexity, ``equal_flops`` the cost of the dense model."""


def main() -> None:
    """Measure the cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--acceleration", nargs="+", default=["auto", "none"], choices=["auto", "none"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides")
    parser.add_argument("--gpus", type=int, default=1, help="under torchrun, if more than one")
    parser.add_argument("--out", type=Path, default=Path("step.json"))
    parser.add_argument("--compare", type=Path, help="an earlier --out")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        _measure_here(options.names[0], options.acceleration[0], options)
        return
    if unknown := [name for name in options.names if name not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}; the cases are {', '.join(CASES)}")
    require_gpu()
    before = json.loads(options.compare.read_text(encoding="utf-8")) if options.compare else {}
    keys = [f"{name} {acceleration}" for name in options.names for acceleration in options.acceleration]
    processes = [_start(key, options) for key in keys]  # all import at the same time
    results, complaints = {}, []
    for key, process in zip(keys, processes, strict=True):
        output, errors = process.communicate("go\n")
        if process.returncode:
            complaints.append(f"{key} failed")
            print(f"{key} failed: {errors[-3000:]}", flush=True)
            continue
        results[key] = json.loads(output[output.index("{") :])
        found = Measurement(**results[key])
        print(_line(key, found), flush=True)
        options.out.write_text(json.dumps(results, indent=1), encoding="utf-8")
        if key in before:
            complaints += _complaints(key, found, Measurement(**before[key]))
    print("\n".join(complaints))
    sys.exit(bool(complaints))


def _measure_here(name: str, acceleration: str, options: argparse.Namespace) -> None:
    """Measure one case in this process, which waits for a line of input before it takes the GPU."""
    from megatron_mosa.config import load_config
    from megatron_mosa.parallel import destroy_parallel, initialize_parallel
    from megatron_mosa.tools.bench.measure import measure

    if options.gpus == 1:
        sys.stdin.readline()
    file, overrides = CASES[name]
    config = load_config(CONFIGS / file, [*overrides, f"train.acceleration={acceleration}", *options.set])
    layout = initialize_parallel(config.parallel.tensor_model_parallel_size, config.run.seed)
    found = measure(config, layout, options.steps, warmup=5)
    if layout.is_main:
        print(json.dumps(asdict(found)))
    destroy_parallel()


def _start(key: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    name, acceleration = key.split()
    command = [sys.executable, "-W", "ignore", "-m"]
    if options.gpus > 1:
        command += ["torch.distributed.run", f"--nproc-per-node={options.gpus}", "-m"]
    command += ["benchmarks.step", name, "--here", "--acceleration", acceleration, "--gpus", str(options.gpus)]
    command += ["--steps", str(options.steps), "--set", *options.set]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")
    if options.gpus > 1:
        process.wait()  # torchrun hands no input on, so these run one after the other
    return process


def _complaints(key: str, found: Measurement, before: Measurement) -> list[str]:
    if differs := difference(found, before):
        return [f"{key} cannot be compared: the earlier file was measured with {differs}"]
    return [f"{key} is slower: {line}" for line in slower(found, before)]


def _line(key: str, found: Measurement) -> str:
    profile = found.profile or {"busy": 0.0, "host_calls": 0, "kernels": 0}
    return (
        f"{key:18} {found.median:7.1f} ms ({min(found.milliseconds):.1f} to {max(found.milliseconds):.1f}) busy "
        f"{profile['busy']:6.1f} MFU {100 * found.mfu():4.1f} % {found.tokens_per_second / 1000:6.1f}k/s "
        f"{found.allocated_gib:5.1f} {found.reserved_gib:5.1f} GiB {profile['host_calls']:6d} calls "
        f"{profile['kernels']:6d} kernels | {found.layout} | {found.acceleration}"
    )


if __name__ == "__main__":
    main()
