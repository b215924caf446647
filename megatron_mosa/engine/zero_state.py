"""Master weights, Adam moments and gradients of a parameter, wherever a ZeRO stage keeps them.

Every accessor speaks of whole tensors of this tensor-parallel rank, in fp32: what the data-parallel ranks hold in parts
is put together when read and taken apart when written. Reading is a collective over the data-parallel group.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor


class ZeroState(Protocol):
    """Access to the state of one engine."""

    def optimised_tensors(self) -> list[Tensor]:
        """The tensors that the base optimizer steps, keys of its state."""
        ...

    def link(self) -> None:
        """Let parameters see moments that were created since."""
        ...

    def read(self, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
        """The fp32 master weight (None) or a moment, a tensor of the caller's own."""
        ...

    def write(self, parameter: torch.nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Replace it; with the master weight, the weight that the model computes with changes too."""
        ...

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        """The gradient, averaged over data-parallel ranks; between backward and step."""
        ...


def zero_state(engine: Any) -> ZeroState:
    """The accessor for a DeepSpeed engine's stage and precision."""
    stage = engine.zero_optimization_stage()
    return (
        ReplicatedState(engine) if stage == 0 else PartitionedWeightState(engine) if stage == 3 else FlatState(engine)
    )


class ReplicatedState:
    """Stage 0 in fp32: plain parameters under a plain optimizer."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer

    def optimised_tensors(self) -> list[Tensor]:
        """Every parameter."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def link(self) -> None:
        """Nothing to link."""

    def read(self, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
        """A copy."""
        return self._stored(parameter, moment).clone()

    def write(self, parameter: torch.nn.Parameter, moment: str | None, value: Tensor) -> None:
        """In place."""
        self._stored(parameter, moment).copy_(value)

    def _stored(self, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
        return parameter.detach() if moment is None else self.optimizer.state[parameter][moment]

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        """Already averaged by DeepSpeed."""
        assert parameter.grad is not None
        return parameter.grad


class FlatState:
    """Stages 1 and 2: each rank steps one flat fp32 partition of every parameter group."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer

    def optimised_tensors(self) -> list[Tensor]:
        """This rank's flat partitions."""
        return [group["params"][0] for group in self.optimizer.optimizer.param_groups]

    def link(self) -> None:
        """DeepSpeed links after the first group's first step only, and so misses the others."""
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def read(self, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
        """Put together by an all-reduce."""
        if moment is None:
            return cast(Tensor, safe_get_full_fp32_param(parameter))
        return cast(Tensor, safe_get_full_optimizer_state(parameter, moment))

    def write(self, parameter: torch.nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Each rank keeps its fragment."""
        if moment is None:
            parameter.data.copy_(value)
        cast(Any, parameter).set_full_hp_param(value, moment)

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        """Put together by an all-reduce."""
        return cast(Tensor, safe_get_full_grad(parameter))


class PartitionedWeightState:
    """Stage 3: parameters themselves are partitioned, each flat and padded to a multiple of the group's size."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer

    def optimised_tensors(self) -> list[Tensor]:
        """This rank's flat partitions."""
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def link(self) -> None:
        """Nothing to link."""

    def read(self, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
        """Put together by an all-gather."""
        return self.optimizer.get_full_hp_param(parameter, moment)

    def write(self, parameter: torch.nn.Parameter, moment: str | None, value: Tensor) -> None:
        """Each rank keeps its partition; DeepSpeed's own way fails where the group's size does not divide."""
        part = own_partition(parameter, value)
        self.optimizer.set_local_hp_param(part, parameter, moment)
        if moment is None:
            fill(parameter, value)

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        """Put together by an all-gather."""
        return self.optimizer.get_fp32_grad_for_param(parameter)


def own_partition(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of ``value`` by stage 3's partition of ``parameter``, flat and padded with zeros."""
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
    if parameter.data.numel() == parameter.ds_numel:  # small ones are kept whole as well
        parameter.data.copy_(value)
