"""Launches that Triton does not look up again; in the interpreter, which compiles nothing, there are none."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from megatron_mosa.kernels.triton.common import TensorDescriptor, launch


def launches(*calls: tuple[Any, ...], options: tuple[int, ...] = (16,)) -> tuple[mock.MagicMock, mock.MagicMock]:
    """Launch a kernel of a tensor, of what may be None, and of a number; return it and what it is compiled to."""
    kernel = mock.MagicMock(arg_names=["p_x", "p_none", "N", "SHIFT", "BLOCK"])
    compiled = mock.MagicMock()
    kernel.__getitem__.return_value.return_value = compiled
    for block in options:
        for call in calls:
            launch(kernel, (5, 2), *call, BLOCK=block, SHIFT=1, num_warps=4)
    return kernel.__getitem__.return_value, compiled


def test_a_similar_launch_is_not_looked_up() -> None:
    states, other = torch.zeros(2, 64).unbind(0)
    looked_up, compiled = launches((states, None, 3), (other, None, 5))
    looked_up.assert_called_once_with(states, None, 3, BLOCK=16, SHIFT=1, num_warps=4)
    compiled.__getitem__.assert_called_once_with((5, 2, 1))
    compiled.__getitem__.return_value.assert_called_once_with(other.data_ptr(), None, 5, 1, 16)


def test_what_triton_compiles_anew_is_looked_up() -> None:
    states, large = torch.zeros(64), 1 << 31
    numbers = 1, 2, 16, large, large + 16, 0.5, True, None
    tensors = states, states[1:], states.bfloat16(), torch.nn.Parameter(states[2:])
    calls = [(states, None, number) for number in numbers] + [(tensor, None, 3) for tensor in tensors[1:]]
    calls += [(states, states, 3)]
    looked_up, compiled = launches(*calls, options=(16, 32))
    assert looked_up.call_count == 2 * len(calls) and not compiled.__getitem__.called


def test_options_are_told_apart_by_name() -> None:
    kernel = mock.MagicMock(arg_names=["p_x", "SHIFT", "BLOCK"])
    states = torch.zeros(4)
    launch(kernel, (1,), states, SHIFT=1, BLOCK=16)
    launch(kernel, (1,), states, BLOCK=1, SHIFT=16)
    launch(kernel, (1,), states, SHIFT=1, BLOCK=16, num_warps=2)
    launch(kernel, (1,), states, SHIFT=1, BLOCK=16, num_stages=2)
    assert kernel.__getitem__.return_value.call_count == 4


@pytest.mark.skipif(TensorDescriptor is None, reason="no descriptors")
def test_descriptors_of_other_blocks_are_looked_up() -> None:
    states = torch.zeros(64, 64)
    kinds = [(tensor, [16, size]) for tensor in (states, states + 1) for size in (16, 32)]
    looked_up, compiled = launches(*((TensorDescriptor.from_tensor(*kind), None, 3) for kind in kinds))
    assert looked_up.call_count == compiled.__getitem__.call_count == 2


def test_the_interpreter_compiles_nothing() -> None:
    kernel = mock.MagicMock(arg_names=["p_x", "BLOCK"])
    kernel.__getitem__.return_value.return_value = None
    for _ in range(2):
        launch(kernel, (1,), torch.zeros(4), BLOCK=16)
    assert kernel.__getitem__.return_value.call_count == 2
