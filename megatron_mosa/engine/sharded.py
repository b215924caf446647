"""Weights and gradients that ranks share under ZeRO-2 and 3, moved a layer at a time without the host's help.

DeepSpeed's stage 3 moves them in hooks with much Python for each parameter, which wait for the device in every
micro-batch. Here every address is fixed, so that a micro-batch with all its collectives can be one CUDA
graph; DeepSpeed keeps the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import Any, cast

import torch
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.nn import Module, Parameter
from torch.utils.hooks import RemovableHandle

from megatron_mosa.engine.flat_buffers import OwnPart, is_counted
from megatron_mosa.kernels import KernelBackend, naive
from megatron_mosa.parallel import data_parallel_group

_ALIGNMENT = 128  # elements; each parameter begins at a multiple in its slot, since kernels read 16 bytes at once


@dataclass(eq=False)
class _Slot:
    """Memory for the weights of one unit at a time."""

    units: list[_Unit] = field(default_factory=list)
    holder: _Unit | None = None


@dataclass(eq=False)
class _Unit:
    """Parameters whose weights are gathered, and whose gradients are reduced, together."""

    parameters: list[Parameter]
    total: Tensor
    """This rank's parts of their gradients, flat, fp32."""

    slot: _Slot
    whole: list[Tensor] = field(default_factory=list)
    """The gathered weights of each, flat and padded to a multiple of the number of ranks; in the slot."""

    arrival: Any = None
    """The event after which they are there; None: the current stream has waited for it."""

    left: set[Parameter] = field(default_factory=set)
    """Those whose gradients this backward pass has not reached."""


class ShardedLayers:
    """ZeRO-2 and 3: each rank keeps a part of every parameter, of its gradient and of its optimizer state.

    A layer's gradients are reduced once its backward pass has made them, while the layer below computes. Under ZeRO-2,
    weights are gathered once a step. Under ZeRO-3, they are gathered before forward and again before backward, a layer
    ahead. Layers take turns in two slots of memory, and the two ends of the model in a third one.

    All collectives run on one stream, in the order of their calls: a collective waits for what the computing stream was
    given before, which includes the last use of the memory that it writes to.

    Args:
        optimizer: DeepSpeed's stage-3 optimizer around torch's AdamW, under ZeRO-2, too: stage 2 would partition a
            flat buffer of all layers, of which a layer belongs to one rank. Its hooks are removed.
        modules: the modules that use matrices in the order of their calls, with these: first the embedding, and last
            the output layer. All other parameters stay whole throughout a pass.
        keeps_weights: ZeRO-2.
        kernels: the backend that accumulates gradients.
    """

    def __init__(
        self,
        optimizer: Any,
        modules: Sequence[tuple[Module, list[Parameter]]],
        keeps_weights: bool,
        kernels: KernelBackend = naive,
    ) -> None:
        optimizer.destroy()  # nothing but hooks
        # DeepSpeed keeps the model in a global list, for these hooks.
        parameter_offload.FWD_MODULE_STACK[:] = [
            module for module in parameter_offload.FWD_MODULE_STACK if module is not optimizer.module
        ]
        self.kernels = kernels
        self.keeps_weights = keeps_weights
        self.group = data_parallel_group()
        self.parts, self._totals = _parts(optimizer)
        self._order, self._always = self._units(modules)
        self._all = list(dict.fromkeys(chain([self._always], self._order)))
        for slot in dict.fromkeys(unit.slot for unit in self._all):
            self._allocate(slot)
        device = self._always.total.device
        dtype = self._always.parameters[0].dtype
        self._part = torch.empty(max(unit.total.numel() for unit in self._all), dtype=dtype, device=device)
        # Other ranks wait for a collective, so its blocks go first.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None  # type: ignore[arg-type]
        self._reduction: tuple[Any, list[Tensor]] | None = None  # the last one, and what it reads
        self._is_first: Tensor
        self._hooks: list[RemovableHandle] = []
        for unit in self._all:
            for parameter in unit.parameters:
                hook = partial(self._reach, unit)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        if not keeps_weights:
            for position, (module, _) in enumerate(modules):
                self._hooks.append(module.register_forward_pre_hook(partial(self._before_forward, position)))
                if position > 0:  # the backward pass of the embedding reads no weight
                    self._hooks.append(module.register_forward_hook(partial(self._after_forward, position)))

    def start_step(self) -> None:
        """Gather all weights under ZeRO-2: the last step, or what was loaded since, has changed them."""
        if self.keeps_weights:
            self._forget()
            for unit in self._all:
                self._gather(unit)
            for unit in self._all:
                self._wait_for(unit)

    def start_pass(self, is_first: Tensor) -> None:
        self._is_first = is_first
        for unit in self._all:
            unit.left = set(unit.parameters)
        if not self.keeps_weights:
            self._forget()
            self._gather(self._always)
            self._wait_for(self._always)

    def finish_pass(self) -> None:
        for unit in self._all:
            if unit.left:
                self._reduce(unit)
        self._wait_for_reduction()
        for unit in self._all:
            self._wait_for(unit)

    def reduce(self) -> None:
        """Do nothing: the passes have done it."""

    def publish(self) -> None:
        """Do nothing: weights are gathered where they are used, or by the next ``start_step``."""

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _units(self, modules: Sequence[tuple[Module, list[Parameter]]]) -> tuple[list[_Unit], _Unit]:
        """Return the unit of each module, and the one of all other parameters."""
        ends, layers = _Slot(), (_Slot(), _Slot())
        units: dict[tuple[Parameter, ...], _Unit] = {}
        order = []
        for position, (_, parameters) in enumerate(modules):
            shared = ends if position in (0, len(modules) - 1) else layers[position % 2]
            key = tuple(parameters)
            if key not in units:  # the output layer may be the embedding
                units[key] = self._unit(parameters, _Slot() if self.keeps_weights else shared)
            order.append(units[key])
        others = self._totals.keys() - set(chain(*units))
        return order, self._unit([parameter for parameter in self._totals if parameter in others], _Slot())

    def _unit(self, parameters: list[Parameter], slot: _Slot) -> _Unit:
        totals = [self._totals[parameter] for parameter in parameters]
        for total, following in pairwise(totals):
            assert total.storage_offset() + total.numel() == following.storage_offset(), "not in DeepSpeed's order"
        total = totals[0].as_strided((sum(t.numel() for t in totals),), (1,))
        unit = _Unit(parameters, total, slot)
        slot.units.append(unit)
        return unit

    def _allocate(self, slot: _Slot) -> None:
        """Allocate a slot, and make the parameters of its units views of it."""
        sizes = {parameter: self._padded_size(parameter) for unit in slot.units for parameter in unit.parameters}
        aligned = {parameter: -(-size // _ALIGNMENT) * _ALIGNMENT for parameter, size in sizes.items()}
        size = max(sum(aligned[parameter] for parameter in unit.parameters) for unit in slot.units)
        example = slot.units[0].parameters[0]
        memory = torch.zeros(size, dtype=example.dtype, device=self._totals[example].device)
        for unit in slot.units:
            places = memory[: sum(aligned[p] for p in unit.parameters)].split([aligned[p] for p in unit.parameters])
            for parameter, place in zip(unit.parameters, places, strict=True):
                whole = place[: sizes[parameter]]
                unit.whole.append(whole)
                shape = cast(Any, parameter).ds_shape
                parameter.data = whole[: shape.numel()].view(shape)

    def _padded_size(self, parameter: Parameter) -> int:
        return self._totals[parameter].numel() * self.group.size()

    def _before_forward(self, position: int, *_: Any) -> None:
        unit = self._order[position]
        self._gather(unit)
        self._wait_for(unit)
        if position + 1 < len(self._order):
            self._gather(self._order[position + 1])

    def _after_forward(self, position: int, module: Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(partial(self._before_backward, position))

    @torch.no_grad()
    def _before_backward(self, position: int, _: Tensor) -> None:
        unit = self._order[position]
        self._gather(unit)
        self._wait_for(unit)
        if position > 1:  # the embedding's weight is not needed
            self._gather(self._order[position - 1])

    def _forget(self) -> None:
        """Let all weights be gathered anew."""
        for unit in self._all:
            unit.slot.holder = None

    @torch.no_grad()
    def _gather(self, unit: _Unit) -> None:
        """Begin to gather the weights, if they are not in their slot."""
        if unit.slot.holder is unit:
            return
        unit.slot.holder = unit
        with self._communicating(), _coalescing_manager(self.group):
            for parameter, whole in zip(unit.parameters, unit.whole, strict=True):
                dist.all_gather_into_tensor(whole, cast(Any, parameter).ds_tensor, group=self.group)
        unit.arrival = self._event()

    def _wait_for(self, unit: _Unit) -> None:
        if unit.arrival is not None:
            torch.cuda.current_stream().wait_event(unit.arrival)
            unit.arrival = None

    def _reach(self, unit: _Unit, parameter: Parameter) -> None:
        unit.left.remove(parameter)
        if not unit.left:
            self._reduce(unit)

    @torch.no_grad()
    def _reduce(self, unit: _Unit) -> None:
        """Begin to add the gradients of a unit, summed over ranks, to this rank's total."""
        self._wait_for_reduction()
        gradients = [self._padded_gradient(parameter) for parameter in unit.parameters]
        part = self._part[: unit.total.numel()]
        parts = part.split([gradient.numel() // self.group.size() for gradient in gradients])
        with self._communicating():
            with _coalescing_manager(self.group):
                for reduced, gradient in zip(parts, gradients, strict=True):
                    dist.reduce_scatter_tensor(reduced, gradient, group=self.group)
            self.kernels.accumulate(unit.total, part, self._is_first)
        self._reduction = self._event(), gradients
        unit.left.clear()

    def _padded_gradient(self, parameter: Parameter) -> Tensor:
        """Take a parameter's gradient, flat and padded with zeros; zeros if backward has not reached it."""
        size, gradient = self._padded_size(parameter), parameter.grad
        # Else autograd would add the next gradient to this one: in a graph, to memory that others use by then.
        parameter.grad = None
        if gradient is None:
            return self._part.new_zeros(size)
        flat = gradient.flatten()
        return flat if flat.numel() == size else torch.nn.functional.pad(flat, (0, size - flat.numel()))

    def _wait_for_reduction(self) -> None:
        """Let the current stream wait for the last reduction, so that what it reads can be freed."""
        if self._reduction is not None and self._reduction[0] is not None:
            torch.cuda.current_stream().wait_event(self._reduction[0])
        self._reduction = None

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        """Run after what the current stream was given so far, and beside what follows."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def _event(self) -> Any:
        return None if self._stream is None else self._stream.record_event()


def _parts(optimizer: Any) -> tuple[list[OwnPart], dict[Parameter, Tensor]]:
    """Return this rank's part of each group, and its part of each parameter's gradient, in DeepSpeed's order."""
    parts, totals, begin = [], {}, 0
    for number, parameters in enumerate(optimizer.fp16_groups):
        weights = optimizer.fp32_partitioned_groups_flat[number]
        gradient = optimizer.grad_partitions_flat_buffer[begin : begin + weights.numel()]
        options = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[number]]
        rounded = optimizer.fp16_partitioned_groups_flat[number]
        parts.append(OwnPart(weights, rounded, gradient, options, is_counted(parameters)))
        sizes = [parameter.partition_numel() for parameter in parameters]
        totals |= dict(zip(parameters, gradient.split(sizes), strict=True))
        begin += weights.numel()
    return parts, totals
