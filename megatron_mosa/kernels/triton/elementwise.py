"""Elementwise operations of a training step, with less memory traffic than torch's and Inductor's kernels."""

# A launch takes more than the kernel's own parameters, which the checker cannot know.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _accumulate_kernel(p_total, p_gradient, p_replaces, N, BLOCK: tl.constexpr):
    """Add p_gradient to p_total, or replace p_total by it, without reading it then."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(p_gradient + i, mask=i < N).to(tl.float32)
    if tl.load(p_replaces) == 0:
        gradient += tl.load(p_total + i, mask=i < N)
    tl.store(p_total + i, gradient, mask=i < N)


def accumulate(total: Tensor, gradient: Tensor, replaces: Tensor) -> None:
    """Compute ``naive.accumulate``; torch's kernels for mixed types are not vectorized and reach half the bandwidth."""
    number = total.numel()
    _accumulate_kernel[(triton.cdiv(number, BLOCK),)](
        total, gradient.contiguous(), replaces, number, BLOCK=BLOCK, num_warps=8
    )


@triton.jit
def _swiglu_kernel(p_gate_up, p_out, F, BLOCK: tl.constexpr):
    """Compute a block of a row of p_out, [N, F], from p_gate_up, [N, 2F]."""
    i_row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_gate_up += i_row * 2 * F + i
    gate = tl.load(p_gate_up, mask=i < F).to(tl.float32)
    up = tl.load(p_gate_up + F, mask=i < F).to(tl.float32)
    tl.store(p_out + i_row * F + i, (gate * tl.sigmoid(gate) * up).to(p_out.dtype.element_ty), mask=i < F)


@triton.jit
def _swiglu_backward_kernel(p_gate_up, p_dout, p_dgate_up, F, BLOCK: tl.constexpr):
    """Compute both halves of the gradient, reading each input once."""
    i_row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_gate = i_row * 2 * F + i
    gate = tl.load(p_gate_up + o_gate, mask=i < F).to(tl.float32)
    up = tl.load(p_gate_up + o_gate + F, mask=i < F).to(tl.float32)
    dout = tl.load(p_dout + i_row * F + i, mask=i < F).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dout * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dout * gate * sigmoid
    tl.store(p_dgate_up + o_gate, dgate.to(p_dgate_up.dtype.element_ty), mask=i < F)
    tl.store(p_dgate_up + o_gate + F, dup.to(p_dgate_up.dtype.element_ty), mask=i < F)


def _grid(width: int, rows: int) -> tuple[int, int]:
    return rows, -(-width // BLOCK)


@torch.library.custom_op("megatron_mosa::fused_swiglu", mutates_args=())
def fused_swiglu(gate_up: Tensor) -> Tensor:
    """Compute ``naive.swiglu``."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    _swiglu_kernel[_grid(width, gate_up.numel() // (2 * width))](gate_up, out, width, BLOCK=BLOCK, num_warps=8)
    return out


@fused_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op("megatron_mosa::fused_swiglu_backward", mutates_args=())
def fused_swiglu_backward(gate_up: Tensor, dout: Tensor) -> Tensor:
    """Return the gradient of the input of ``fused_swiglu``."""
    gate_up, dout = gate_up.contiguous(), dout.contiguous()
    width = dout.shape[-1]
    dgate_up = torch.empty_like(gate_up)
    grid = _grid(width, gate_up.numel() // (2 * width))
    _swiglu_backward_kernel[grid](gate_up, dout, dgate_up, width, BLOCK=BLOCK, num_warps=8)
    return dgate_up


@fused_swiglu_backward.register_fake
def _(gate_up: Tensor, dout: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> Tensor:
    return fused_swiglu_backward(*ctx.saved_tensors, dout)


fused_swiglu.register_autograd(_backward, setup_context=_keep)
