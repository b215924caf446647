"""Triton's rotary embedding, interpreted, and the plain one, against rotation by complex numbers in fp64."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_mosa.kernels import KernelBackend, get_backend, naive
from megatron_mosa.kernels.triton import attention, rotary
from tests.kernels.test_documents import pack

# T, B, groups, queries a group, h', share that is rotated
SHAPES: list[tuple] = [
    (5, 2, 3, 1, 8, 1.0),
    (5, 2, 3, 1, 8, 0.5),
    (9, 3, 2, 3, 12, 0.7),  # groups; 8 of 12 channels; 27 rows are two programs of 16
    (2, 1, 1, 1, 4, 0.0),
]


def exact(qkv: Tensor, percent: float, base: float, starts: Tensor | None, stride: int) -> list[Tensor]:
    """Queries, keys and values, [B, heads, T, h'], of [T, B, G, H / G + 2, h'] in fp64; pairs are complex numbers."""
    length, _, groups, slots, size = qkv.shape
    half = int(size * percent) // 2
    positions = stride * torch.arange(length, dtype=torch.float64)[None] - (0 if starts is None else starts)
    angles = positions[..., None] * base ** (-torch.arange(half, dtype=torch.float64) / max(1, half))
    turns = torch.polar(torch.ones_like(angles), angles)  # [1 | B, T, half]
    heads: list[list[Tensor]] = [[], [], []]
    for group in range(groups):
        for slot in range(slots):
            states = qkv[:, :, group, slot].transpose(0, 1)  # [B, T, h']
            kind = max(0, slot - slots + 3)
            if kind < 2:
                turned = torch.complex(states[..., :half], states[..., half : 2 * half]) * turns
                states = torch.cat((turned.real, turned.imag, states[..., 2 * half :]), dim=-1)
            heads[kind].append(states)
    return [torch.stack(states, dim=1) for states in heads]


def check_split_heads(
    kernels: KernelBackend, shape: tuple, documents: bool, dtype: torch.dtype, device: str, stride: int = 1
) -> None:
    """Outputs and the gradient; upstream gradients come transposed, as attention's may."""
    length, batch, groups, queries, size, percent = shape
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(length, batch, groups, queries + 2, size, generator=generator).to(dtype)
    starts = None
    if documents:
        cut = max(1, length // 3)
        starts = pack([[cut, length - cut]] * batch).starts * stride
    reference = inputs.double().requires_grad_()
    wanted = exact(reference, percent, 100.0, starts, stride)
    upstream = [torch.randn(part.shape, generator=generator).to(dtype) for part in wanted]
    (of_reference,) = torch.autograd.grad(wanted, reference, [part.double() for part in upstream])

    qkv = inputs.to(device).requires_grad_()
    found = kernels.split_heads(qkv, percent, 100.0, None if starts is None else starts.to(device), stride)
    transposed = [part.to(device).transpose(1, 2).contiguous().transpose(1, 2) for part in upstream]
    (of_found,) = torch.autograd.grad(found, qkv, transposed)
    angles = 2**-24 * length * stride  # in fp32, largest
    tolerance = {torch.float32: 1e-6 + angles, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    for ours, theirs in zip([*found, of_found], [*wanted, of_reference], strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours.cpu().double() - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_split_heads(backend: str, shape: tuple, documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "ROWS", 16)
    kernels = naive if backend == "naive" else get_backend("triton", torch.empty(0))
    check_split_heads(kernels, shape, documents, torch.float32, "cpu")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_tokens_at_a_distance(backend: str, documents: bool) -> None:
    kernels = naive if backend == "naive" else get_backend("triton", torch.empty(0))
    check_split_heads(kernels, SHAPES[0], documents, torch.float32, "cpu", stride=7)


def test_the_operator_is_sound() -> None:
    """Fake kernels, gradients and strides, by torch's own checks."""
    qkv = torch.randn(3, 2, 2, 4, 8, requires_grad=True)
    for starts in (None, torch.zeros(2, 3, dtype=torch.int64)):
        torch.library.opcheck(rotary.fused_split_heads, (qkv, 0.5, 100.0, starts, 2))


class PretendedGpu:
    """What ``rotary_table`` asks a GPU, and the tables that it computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.is_capturing, self.computed = 1, False, 0
        monkeypatch.setattr(attention, "_TABLES", {})
        monkeypatch.setattr(attention, "_CAPTURED", {})
        monkeypatch.setattr(attention, "_rotary_table", self.compute)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.is_capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mock.Mock(cuda_stream=self.stream))

    def compute(self, *key: object) -> object:
        self.computed += 1
        return key, self.computed

    def table(self, length: int, stream: int = 1, captures: bool = False) -> object:
        self.stream, self.is_capturing = stream, captures
        return attention.rotary_table(length, 4, 1e4, torch.device("cuda", 0))


def test_tables_are_kept_for_each_stream_and_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = PretendedGpu(monkeypatch)
    unknown = gpu.table(7, captures=True)
    assert gpu.table(7, captures=True) != unknown and gpu.computed == 2  # each in the memory of its graph
    first = gpu.table(7)
    assert gpu.table(7) is first and gpu.table(8) is not first and gpu.computed == 4
    assert gpu.table(7, stream=2) is not first and gpu.computed == 5
    assert gpu.table(7, stream=3, captures=True) is first and gpu.computed == 5
    for length in range(10, 30):
        gpu.table(length)
    assert len(attention._TABLES) == attention.MOST_TABLES
    assert gpu.table(7, captures=True) is first and gpu.computed == 25
    assert gpu.table(7) is not first
