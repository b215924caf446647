"""Checks that need all ranks of a job: results and bandwidth of collectives, and clock skew between nodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed as dist

from megatron_mosa.cluster.doctor.node import MIB, Report

_GPU_BYTES, _CPU_BYTES = 64 * MIB, 4 * MIB


def bus_bandwidth(collective: str, size: int, seconds: float, world_size: int) -> float:
    """Return the bus bandwidth in GB/s, which compares with the speed of the links for any number of ranks.

    The definition is that of NCCL's tests (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md).

    Args:
        size: bytes of the whole buffer; for an all-gather, of its output.
    """
    factor = {"all-reduce": 2, "all-gather": 1}[collective] * (world_size - 1) / world_size
    return factor * size / seconds / 1e9


def check_collectives(
    report: Report, store: dist.Store, world_size: int, device: torch.device, nodes: list[str], timeout: float
) -> None:
    """Join the process group and add bandwidths and the clock offset to the facts of ``report``.

    Errors of torch.distributed propagate.

    Args:
        device: this rank's GPU for NCCL, or the CPU for gloo.
        nodes: node names by rank.
    """
    report.stage = "joining the process group"
    # One group, two backends: gloo handles tensors on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=store, rank=report.rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    report.facts["backend"] = "nccl" if device.type == "cuda" else "gloo"
    report.stage = "clock skew"
    _measure_clock(report, nodes)
    elements = (_GPU_BYTES if device.type == "cuda" else _CPU_BYTES) // 4 // world_size * world_size
    for name, check in (("all-reduce", _all_reduce), ("all-gather", _all_gather)):
        report.stage = name
        is_correct, seconds = check(report.rank, world_size, elements, device)
        report.facts[name] = bus_bandwidth(name, 4 * elements, seconds, world_size)
        if not is_correct:
            report.add(name, f"{name} over {backend} returns wrong values", "do not train on it; have it serviced")
    report.stage = "leaving the process group"
    dist.all_reduce(torch.zeros(1))  # no rank leaves before all are done
    dist.destroy_process_group()


def _pattern(rank: int, elements: int, device: torch.device) -> torch.Tensor:
    """Integers that differ by rank and position; shape [elements]."""
    return (torch.arange(elements, device=device) % 1021 + rank).float()


def _summand(rank: int, elements: int, device: torch.device) -> torch.Tensor:
    """Integers so small that fp32 sums those of 65,536 ranks exactly, in any order; shape [elements]."""
    return (torch.arange(elements, device=device) % 199 + rank % 53).float()


def _all_reduce(rank: int, world_size: int, elements: int, device: torch.device) -> tuple[bool, float]:
    x = _summand(rank, elements, device)
    dist.all_reduce(x)
    expected = world_size * _summand(0, elements, device) + sum(other % 53 for other in range(world_size))
    is_correct = torch.equal(x, expected)
    x.zero_()  # or repeated sums would overflow
    return is_correct, _median_seconds(lambda: dist.all_reduce(x), device)


def _all_gather(rank: int, world_size: int, elements: int, device: torch.device) -> tuple[bool, float]:
    share = elements // world_size
    shard, gathered = _pattern(rank, share, device), torch.empty(elements, device=device)
    dist.all_gather_into_tensor(gathered, shard)
    expected = torch.cat([_pattern(other, share, device) for other in range(world_size)])
    seconds = _median_seconds(lambda: dist.all_gather_into_tensor(gathered, shard), device)
    return torch.equal(gathered, expected), seconds


def _median_seconds(action: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _measure_clock(report: Report, nodes: list[str]) -> None:
    """Record how far this node's clock is ahead of rank 0's, in seconds; the first rank of each node measures."""
    for node in dict.fromkeys(nodes):
        asker = nodes.index(node)
        if asker and report.rank in (0, asker):
            offset = ask_clock(asker, is_asker=report.rank == asker)
            if report.rank == asker:
                report.facts["clock_offset_s"] = offset
    if report.rank == 0:
        report.facts["clock_offset_s"] = 0.0


def ask_clock(asker: int, *, is_asker: bool, rounds: int = 5) -> float:
    """Return the asker's clock minus rank 0's in seconds, accurate to half a round trip (Cristian's algorithm).

    The shortest of several rounds counts. Both ranks must call it.
    """
    best = (float("inf"), 0.0)
    stamp = torch.zeros(1, dtype=torch.float64)
    for _ in range(rounds):
        if is_asker:
            start = time.time()
            dist.send(stamp, 0)
            dist.recv(stamp, 0)
            end = time.time()
            best = min(best, (end - start, (start + end) / 2 - stamp.item()))
        else:
            dist.recv(stamp, asker)
            stamp[0] = time.time()
            dist.send(stamp, asker)
    return best[1]
