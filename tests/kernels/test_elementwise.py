"""Elementwise kernels, interpreted, against autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_mosa.kernels import naive
from megatron_mosa.kernels.triton import elementwise


def check_swiglu(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(rows, 3, 2 * width, generator=generator).to(dtype)
    dout = torch.randn(rows, 3, width, generator=generator).to(dtype)
    exact = gate_up.double().requires_grad_()
    wanted = naive.swiglu(exact)
    wanted.backward(dout.double())
    ours = gate_up.to(device).requires_grad_()
    found = elementwise.fused_swiglu(ours)
    found.backward(dout.to(device))
    assert found.dtype == dtype and exact.grad is not None and ours.grad is not None
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.grad.cpu().double(), exact.grad, rtol=tolerance, atol=tolerance)


def check_accumulate(number: int, dtype: torch.dtype, device: str) -> None:
    total = torch.randn(number, generator=torch.Generator().manual_seed(0)).to(device)
    gradient = torch.randn(number, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    for kernels in (naive, elementwise):
        found = total.clone()
        kernels.accumulate(found, gradient, torch.tensor(False, device=device))
        assert torch.equal(found, total + gradient.float())
        found[0] = torch.nan
        kernels.accumulate(found, gradient, torch.tensor(True, device=device))
        assert torch.equal(found, gradient.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_swiglu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "BLOCK", 8)  # a row of 13 takes two blocks
    check_swiglu(4, 13, dtype, "cpu")
    torch.library.opcheck(elementwise.fused_swiglu, (torch.randn(2, 6, dtype=dtype, requires_grad=True),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_accumulate(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "BLOCK", 8)
    check_accumulate(21, dtype, "cpu")
