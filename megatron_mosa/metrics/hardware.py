"""Peak FLOP/s and peak memory of a device."""

from __future__ import annotations

import resource
import time

import torch

# Dense peak FLOP/s from the vendors' datasheets: bf16 on tensor cores, fp32 without TF32.
_PEAKS = {
    "GB200": (2500e12, 80e12),
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "L40S": (362e12, 91.6e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "RTX 4090": (165e12, 82.6e12),
}


def peak_flops(device: torch.device, precision: str, override_tflops: float | None = None) -> tuple[float, str]:
    """Return the peak FLOP/s of one device and the source of the number.

    Args:
        device: the device of this rank.
        precision: "bf16" or "fp32".
        override_tflops: a peak given by the user, in TFLOP/s.
    """
    if override_tflops is not None:
        return override_tflops * 1e12, "given"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (bf16, fp32) in _PEAKS.items():
            if part in name:
                return (bf16 if precision == "bf16" else fp32), f"datasheet of {part}"
    return _measured_matmul_flops(device, precision), "measured matrix product"


def _measured_matmul_flops(device: torch.device, precision: str, size: int = 512) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        size = 8192
    a = torch.randn(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.matmul(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
