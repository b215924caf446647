"""Checks on the CPU what streams and events of ``ShardedLayers`` order on a GPU: every two uses of the same memory."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_mosa.config import Config
from tests.distributed.compiled_tasks import engine_on
from tests.distributed.tasks import micro_batches, parallel

Clock = dict["Stream", int]
"""How many operations of each stream have certainly ended."""


class Event:
    """A point of a stream; a CUDA graph may wait only for events of its own."""

    def __init__(self, clock: Clock, number: int) -> None:
        self.clock = clock
        self.number = number  # of the pass that it was recorded in


class Stream:
    """Keeps what torch.cuda.Stream would wait for."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.clock: Clock = defaultdict(int)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> Event:
        return Event(dict(self.clock), self.device.passes)

    def wait_event(self, event: Event) -> None:
        if event.number != self.device.passes:
            self.device.faults.append("waits for an event of another pass")
        for stream, count in event.clock.items():
            self.clock[stream] = max(self.clock[stream], count)


class Device:
    """Notes which operation uses which memory on which stream."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.passes = 0
        self.computing = self.current = Stream(self)
        self.uses: list[tuple[Stream, int, int, int, bool, str]] = []
        """Stream, number of the operation on it, first and last address, whether it writes, and its name."""

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def run(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Queue an operation on the current stream; it must come after all that uses the same memory."""
        stream = self.current
        stream.clock[stream] += 1
        for tensor, is_write in [*((t, False) for t in reads), *((t, True) for t in writes)]:
            begin = tensor.data_ptr()
            end = begin + tensor.numel() * tensor.element_size()
            for other, number, first, last, wrote, what in self.uses:
                is_shared = first < end and begin < last and (wrote or is_write)
                if is_shared and stream.clock[other] < number:
                    self.faults.append(f"{name} may run before {what}")
            self.uses.append((stream, stream.clock[stream], begin, end, is_write, name))


def faults(config: Config, steps: int, without: str = "") -> list[str]:
    """Take steps, without what a method does; return which uses of memory nothing orders, and what no graph allows."""
    device = Device()
    with parallel(config) as layout, engine_on("graphs", config, layout) as engine:
        assert engine._graphed is not None
        storage: Any = engine._graphed.storage
        storage._stream = Stream(device)
        if without:
            setattr(storage, without, lambda *_: None)
        for unit in storage._all:
            for module in _modules_of(engine.module, unit):
                module.register_forward_hook(_reading(device, unit))
        with _watched(device, storage), mock.patch.object(engine._graphed, "_update", _updating(device, engine)):
            for step in range(steps):
                engine.train_step(micro_batches(config, layout, step), 1e-3)
                engine.evaluate(micro_batches(config, layout, 99))
    return sorted(set(device.faults))


def _modules_of(model: Any, unit: Any) -> Iterator[torch.nn.Module]:
    """Yield the modules whose calls read a unit's weights."""
    for module in (model.embedding.word_embeddings, *model.decoder.layers, model.output_loss):
        parameters = [model.vocabulary_layer.weight] if module is model.output_loss else [*module.parameters()]
        if set(parameters) & set(unit.parameters):
            yield module


def _reading(device: Device, unit: Any) -> Any:
    def read(module: torch.nn.Module, args: Any, output: Any) -> None:
        device.run(f"forward of {type(module).__name__}", unit.whole, [])

    return read


def _updating(device: Device, engine: Any) -> Any:
    update, parts = engine._graphed._update, engine._graphed.storage.parts

    def run(norm: Tensor) -> None:
        update(norm)
        device.run("optimizer", [part.gradient for part in parts], [part.rounded for part in parts])

    return run


@contextlib.contextmanager
def _watched(device: Device, storage: Any) -> Iterator[None]:
    """Let the device see collectives, what they wait for, and what backward passes read and write."""
    gather, reduce, accumulate = dist.all_gather_into_tensor, dist.reduce_scatter_tensor, storage.kernels.accumulate
    reach, wait, start, finish = storage._reach, storage._wait_for_reduction, storage.start_pass, storage.finish_pass

    def gather_noted(whole: Tensor, shard: Tensor, **options: Any) -> None:
        device.run("gather", [shard], [whole])
        gather(whole, shard, **options)

    def reduce_noted(part: Tensor, gradient: Tensor, **options: Any) -> None:
        device.run("reduction", [gradient], [part])
        reduce(part, gradient, **options)

    def accumulate_noted(total: Tensor, part: Tensor, is_first: Tensor) -> None:
        device.run("accumulation", [part], [total])
        accumulate(total, part, is_first)

    def wait_noted() -> None:
        freed = storage._reduction[1] if storage._reduction is not None else []
        wait()
        device.run("other use of gradients' memory", [], freed)

    def start_noted(is_first: Tensor) -> None:
        device.passes += 1
        start(is_first)

    def finish_noted() -> None:
        finish()
        if any(device.computing.clock[stream] < count for stream, count in storage._stream.clock.items()):
            device.faults.append("a pass ends before its collectives")

    def reach_noted(unit: Any, parameter: torch.nn.Parameter) -> None:
        assert parameter.grad is not None
        device.run("backward", unit.whole, [parameter.grad])
        reach(unit, parameter)

    with contextlib.ExitStack() as stack:
        for of, name, noted in (
            (dist, "all_gather_into_tensor", gather_noted),
            (dist, "reduce_scatter_tensor", reduce_noted),
            (storage.kernels, "accumulate", accumulate_noted),
            (storage, "_wait_for_reduction", wait_noted),
            (storage, "start_pass", start_noted),
            (storage, "finish_pass", finish_noted),
            (torch.cuda, "current_stream", lambda: device.current),
            (torch.cuda, "stream", device.on),
        ):
            stack.enter_context(mock.patch.object(of, name, noted))
        for unit in storage._all:
            for parameter in unit.parameters:
                parameter._post_accumulate_grad_hooks.clear()
                parameter.register_post_accumulate_grad_hook(lambda p, unit=unit: reach_noted(unit, p))
        yield
