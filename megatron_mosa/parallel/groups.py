"""Typed access to Megatron-core's process groups."""

from __future__ import annotations

from typing import cast

from torch.distributed import ProcessGroup


def tensor_parallel_group() -> ProcessGroup:
    """Return the ranks that hold the parts of one replica."""
    from megatron.core import parallel_state  # slow to import, and commands that only read need no groups

    return cast(ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def data_parallel_group() -> ProcessGroup:
    """Return the ranks that hold the same part of different replicas."""
    from megatron.core import parallel_state

    return cast(ProcessGroup, parallel_state.get_data_parallel_group())
