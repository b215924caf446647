"""Access to master weights, Adam moments and gradients under every ZeRO stage.

Accessors read and write whole fp32 tensors of this tensor-parallel rank, which data-parallel ranks may hold in parts:
reading gathers them, as a collective over the data-parallel group, and writing keeps each rank's part.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor


class ZeroState(Protocol):
    """Access to the state of an engine of some ZeRO stage."""

    def optimised_tensors(self) -> list[Tensor]:
        """Return the tensors that the base optimizer steps, which are the keys of its state."""
        ...

    def link(self) -> None:
        """Link parameters to moments that were created after DeepSpeed's initialization."""
        ...

    def read(self, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
        """Return a copy of the fp32 master weight (``moment`` None) or of a moment."""
        ...

    def write(self, parameter: torch.nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Set the master weight, with the weight that the model computes with, or a moment."""
        ...

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        """Return the gradient, averaged over data-parallel ranks; between backward and step."""
        ...


def zero_state(engine: Any) -> ZeroState:
    """Return the accessor for the ZeRO stage of a DeepSpeed engine."""
    kinds = {0: ReplicatedState, 3: PartitionedWeightState}
    return kinds.get(engine.zero_optimization_stage(), FlatState)(engine)


class ReplicatedState:
    """Stage 0 in fp32: plain parameters under a plain optimizer."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer

    def optimised_tensors(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def link(self) -> None:
        """Do nothing: the moments are in the optimizer's own state."""

    def read(self, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
        return self._stored(parameter, moment).clone()

    def write(self, parameter: torch.nn.Parameter, moment: str | None, value: Tensor) -> None:
        self._stored(parameter, moment).copy_(value)

    def _stored(self, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
        return parameter.detach() if moment is None else self.optimizer.state[parameter][moment]

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad


class FlatState:
    """Stages 1 and 2: each rank steps one flat fp32 partition of every parameter group."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer

    def optimised_tensors(self) -> list[Tensor]:
        return [group["params"][0] for group in self.optimizer.optimizer.param_groups]

    def link(self) -> None:
        """Link the moments again: DeepSpeed does so after the first group's first step, and misses the other groups."""
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def read(self, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
        if moment is None:
            return cast(Tensor, safe_get_full_fp32_param(parameter))
        return cast(Tensor, safe_get_full_optimizer_state(parameter, moment))

    def write(self, parameter: torch.nn.Parameter, moment: str | None, value: Tensor) -> None:
        if moment is None:
            parameter.data.copy_(value)
        cast(Any, parameter).set_full_hp_param(value, moment)

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        return cast(Tensor, safe_get_full_grad(parameter))


class PartitionedWeightState:
    """Stage 3: parameters themselves are partitioned, each flat and padded to a multiple of the group's size."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer

    def optimised_tensors(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def link(self) -> None:
        """Do nothing: DeepSpeed looks the moments up at every access."""

    def read(self, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
        return self.optimizer.get_full_hp_param(parameter, moment)

    def write(self, parameter: torch.nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Keep this rank's partition. DeepSpeed's own setter fails if the group's size does not divide the tensor's."""
        part = own_partition(parameter, value)
        self.optimizer.set_local_hp_param(part, parameter, moment)
        if moment is None:
            fill(parameter, value)

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        return self.optimizer.get_fp32_grad_for_param(parameter)


def own_partition(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's part of ``value`` under stage 3: flat, and padded with zeros."""
    size = parameter.ds_tensor.ds_numel
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    part = value.new_zeros(size)
    mine = value.flatten()[rank * size : (rank + 1) * size]
    part[: mine.numel()] = mine
    return part


def fill(parameter: Any, value: Tensor) -> None:
    """Set a parameter's value from the whole tensor, whether ZeRO-3 has partitioned it or not."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.data.copy_(value)
        return
    parameter.ds_tensor.data.copy_(own_partition(parameter, value))
    if parameter.data.numel() == parameter.ds_numel:  # small parameters are also kept whole
        parameter.data.copy_(value)
