"""Launches that Triton does not look up again; in the interpreter, which compiles nothing, there are none."""

from __future__ import annotations

from unittest import mock

import torch

from megatron_mosa.kernels.triton.common import launch


def test_a_launch_with_the_same_numbers_is_not_looked_up() -> None:
    kernel = mock.MagicMock(arg_names=["p_x", "p_none", "N", "SHIFT", "BLOCK"])
    compiled = mock.MagicMock()
    kernel.__getitem__.return_value.return_value = compiled
    states, other = torch.zeros(2, 64).unbind(0)
    for tensor, number in ((states, 3), (other, 3), (states[1:], 3), (states, 4), (states.bfloat16(), 3)):
        launch(kernel, (5, 2), tensor, None, number, BLOCK=16, SHIFT=1, num_warps=4)
    assert kernel.__getitem__.return_value.call_count == 4  # another tensor of the same alignment and type: no look-up
    compiled.__getitem__.assert_called_once_with((5, 2, 1))
    compiled.__getitem__.return_value.assert_called_once_with(other.data_ptr(), None, 3, 1, 16)
