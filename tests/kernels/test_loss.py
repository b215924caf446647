"""The loss of both backends, with chunks in the interpreted kernel, against torch's cross entropy in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megatron_mosa.kernels import KernelBackend, naive
from megatron_mosa.kernels import triton as fused
from megatron_mosa.kernels.triton import loss


def check_loss(
    kernels: KernelBackend, number: int, width: int, vocabulary: int, dtype: torch.dtype, device: str
) -> None:
    """Check value and gradients, with different weights of tokens, one of them 0 with a target that is not a token."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(number, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(dtype)  # logits of about 1
    targets = torch.randint(0, vocabulary, (number,), generator=generator)
    weights = torch.rand(number, generator=generator)
    weights[1::3] = 0
    targets[1] = -100
    inputs = [tensor.double().requires_grad_() for tensor in (states, weight)]
    each = F.cross_entropy(inputs[0] @ inputs[1].t(), targets, reduction="none", ignore_index=-100)
    wanted = (each * weights).sum()
    gradients = torch.autograd.grad(wanted / 7, inputs)

    ours = [tensor.to(device).requires_grad_() for tensor in (states, weight)]
    arguments = [tensor.to(device) for tensor in (targets, weights)]
    found = kernels.linear_cross_entropy(*ours, *arguments)
    assert found.dtype == torch.float32 and found.shape == ()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.item() == pytest.approx(wanted.item(), rel=tolerance)
    for a, b in zip(torch.autograd.grad(found / 7, ours), gradients, strict=True):
        assert a.dtype == dtype and (a.cpu().double() - b).norm() < tolerance * b.norm()
    with torch.no_grad():
        assert kernels.linear_cross_entropy(*ours, *arguments).item() == pytest.approx(found.item())


@pytest.mark.parametrize("vocabulary", [5, 16, 37])  # less than a block, one, three
def test_loss(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 4)  # of 11 tokens: two chunks, and three tokens
    monkeypatch.setattr(loss, "BLOCK", 16)
    for kernels in (naive, fused):
        check_loss(kernels, 11, 6, vocabulary, torch.float32, "cpu")
        check_loss(kernels, 11, 6, vocabulary, torch.float16, "cpu")


def test_a_loss_that_is_not_finite_stays_so() -> None:
    states, weight = torch.full((2, 3), torch.nan), torch.ones(5, 3)
    for kernels in (naive, fused):
        assert kernels.linear_cross_entropy(states, weight, torch.tensor([0, 1]), torch.ones(2)).isnan()
