"""Sequence-parallel collectives by the GPUs' copy engines, which leave their multiprocessors to computation.

Each rank writes what the others need into memory that they can reach (torch's symmetric memory), waits for all, copies
what it needs from theirs, and waits again, until its own may be overwritten. All of it is queued on the current stream;
what hides it is work on other streams. On a CPU the same by collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import _symmetric_memory as symmetric_memory

_lanes: dict[int, int] = {}
_buffers: dict[tuple[str, int], tuple[int, Any]] = {}
_outgrown: list[Any] = []


def use_lane(stream: torch.cuda.Stream, lane: int) -> None:
    """Give a stream buffers of its own, because collectives on it run beside those of other streams; others share one.

    Args:
        stream: lives as long as the process.
        lane: from 1 on; the same on all ranks.
    """
    _lanes[stream.cuda_stream] = lane


def free_buffers() -> None:
    """Free all buffers; on all ranks, when no collective is running and no graph will be replayed."""
    _buffers.clear()
    _outgrown.clear()


@torch.library.custom_op("megatron_mosa::gather_copies", mutates_args=())
def gather_copies(shard: Tensor, size: int, group: str) -> Tensor:
    """Concatenate the shards of all ``size`` ranks along their first dimension."""
    output = shard.new_empty((size * shard.shape[0], *shard.shape[1:]))
    shard = shard.contiguous()
    if shard.device.type == "cpu":
        distributed.all_gather_into_tensor(output, shard, group=_resolved(group))
        return output
    gather_through(_buffer(shard, (size - 1) * shard.numel(), group), shard, output.chunk(size))
    return output


@gather_copies.register_fake
def _(shard: Tensor, size: int, group: str) -> Tensor:
    return shard.new_empty((size * shard.shape[0], *shard.shape[1:]))


@torch.library.custom_op("megatron_mosa::exchange_copies", mutates_args=())
def exchange_copies(whole: Tensor, size: int, group: str) -> Tensor:
    """Return this rank's slice, of ``size`` along the first dimension, of what all other ranks have.

    Args:
        whole: [T, ...].

    Returns:
        [size - 1, T / size, ...].
    """
    whole = whole.contiguous()
    slices = whole.chunk(size)
    output = whole.new_empty((size - 1, *slices[0].shape))
    if whole.device.type == "cpu":
        process_group = _resolved(group)
        found = torch.empty_like(whole)
        distributed.all_to_all_single(found, whole, group=process_group)
        for number, rank in enumerate(_others(process_group.rank(), size)):
            output[number] = found.chunk(size)[rank]
        return output
    exchange_through(_buffer(whole, output.numel(), group), slices, output)
    return output


@exchange_copies.register_fake
def _(whole: Tensor, size: int, group: str) -> Tensor:
    return whole.new_empty((size - 1, whole.shape[0] // size, *whole.shape[1:]))


def gather_through(buffer: Any, shard: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy the shard of each rank to the part of its number.

    Args:
        buffer: symmetric memory as large as the shard, or larger, with torch's interface.
    """
    buffer.get_buffer(buffer.rank, shard.shape, shard.dtype).copy_(shard)
    buffer.barrier()
    for rank in _others(buffer.rank, len(parts)):
        parts[rank].copy_(buffer.get_buffer(rank, shard.shape, shard.dtype))
    buffer.barrier()
    parts[buffer.rank].copy_(shard)


def exchange_through(buffer: Any, slices: Sequence[Tensor], output: Tensor) -> None:
    """Give each other rank the slice of its number, and copy what they give this one, the next rank's first.

    Args:
        buffer: symmetric memory as large as ``output``, or larger, with torch's interface.
    """
    size, shape, dtype, each = len(slices), slices[0].shape, output.dtype, slices[0].numel()
    # The slice of a rank lies at the place of its distance from this one.
    for place, rank in enumerate(_others(buffer.rank, size)):
        buffer.get_buffer(buffer.rank, shape, dtype, place * each).copy_(slices[rank])
    buffer.barrier()
    for number, rank in enumerate(_others(buffer.rank, size)):
        place = size - 2 - number  # of this rank there
        output[number].copy_(buffer.get_buffer(rank, shape, dtype, place * each))
    buffer.barrier()


def _others(rank: int, size: int) -> list[int]:
    """Return all other ranks, the next one first, so that no two ranks read from the same one at a time."""
    return [(rank + distance) % size for distance in range(1, size)]


def _resolved(group: str) -> distributed.ProcessGroup:
    return distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]


def _buffer(like: Tensor, number: int, group: str) -> Any:
    """Return the current stream's symmetric memory, of at least ``number`` elements; all ranks call it together."""
    needed = number * like.element_size()
    key = group, _lanes.get(torch.cuda.current_stream(like.device).cuda_stream, 0)
    size, buffer = _buffers.get(key, (0, None))
    if size < needed:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"a buffer of {size} bytes cannot grow to {needed} while a CUDA graph is captured")
        _outgrown.append(buffer)  # it may still be read
        memory = symmetric_memory.empty(needed, dtype=torch.uint8, device=like.device)
        buffer = symmetric_memory.rendezvous(memory, group)  # pyright: ignore[reportArgumentType]
        _buffers[key] = needed, buffer
    return buffer
