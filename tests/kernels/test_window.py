"""Sliding-window attention in blocks against the score matrix written out."""

from __future__ import annotations

import pytest
import torch

from megatron_mosa.kernels.window import sliding_window_attention
from tests.kernels.reference import largest_saved


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> torch.Tensor:
    length = query.shape[-2]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.masked_fill((distance < 0) | (distance >= window), -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("length", [1, 2, 7, 16, 63, 100])
@pytest.mark.parametrize("window", [1, 2, 7, 16, 64, 200])
def test_output_and_gradients(length: int, window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, length, 8)
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    output, expected = sliding_window_attention(*inputs, window), reference(*inputs, window)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad(output, inputs, upstream)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_no_tensor_grows_with_the_square_of_the_length() -> None:
    length, window = 4096, 16
    query = torch.randn(1, 1, length, 8, requires_grad=True)
    largest = largest_saved(lambda: sliding_window_attention(query, query, query, window))
    assert 0 < largest <= 4 * length * window
