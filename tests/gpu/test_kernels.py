"""The kernels on a GPU against the CPU."""

from __future__ import annotations

import pytest
import torch

from megatron_mosa.attention import mosa_attention
from megatron_mosa.kernels import Documents, naive
from megatron_mosa.kernels.documents import document_attention
from megatron_mosa.kernels.flash import has_flash
from megatron_mosa.kernels.window import sliding_window_attention
from tests.kernels.test_documents import pack
from tests.kernels.test_naive import make_inputs

LENGTHS = [[100, 1, 27, 128], [256], [3] * 85 + [1]]


def on_gpu(lengths: list[list[int]]) -> Documents:
    return Documents.from_starts(pack(lengths).starts, torch.device("cuda"))


def test_naive_kernels_on_the_gpu_equal_the_cpu() -> None:
    cpu = make_inputs(2, 100, 3, 32, 16)
    gpu = [tensor.detach().cuda().requires_grad_() for tensor in cpu]
    assert torch.equal(
        naive.select_tokens(naive.router_scores(gpu[0], gpu[1]), 7).cpu(),
        naive.select_tokens(naive.router_scores(cpu[0], cpu[1]), 7),
    )
    outputs = [mosa_attention(*tensors, num_selected=7) for tensors in (cpu, gpu)]
    torch.testing.assert_close(outputs[1].cpu(), outputs[0], rtol=1e-9, atol=1e-11)
    gradients = [
        torch.autograd.grad(output.square().sum(), tensors) for output, tensors in zip(outputs, (cpu, gpu), strict=True)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("groups", "window", "packed"),
    [(4, None, True), (2, None, True), (4, 16, True), (4, 16, False), (4, 1000, True), (4, 1000, False)],
)
def test_flash_attention_in_bf16_follows_fp64(groups: int, window: int | None, packed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    doubles = [
        torch.randn(3, heads, 256, 64, dtype=torch.float64, generator=generator).bfloat16().double().requires_grad_()
        for heads in (4, groups, groups)
    ]
    halves = [tensor.detach().cuda().bfloat16().requires_grad_() for tensor in doubles]

    def attend(tensors: list[torch.Tensor], packed: Documents | None) -> torch.Tensor:
        if window is not None:
            return sliding_window_attention(*tensors, window, packed)
        assert packed is not None
        return document_attention(*tensors, packed)

    assert has_flash(halves[0]) and not has_flash(doubles[0])
    exact = attend(doubles, pack(LENGTHS) if packed else None)
    rounded = attend(halves, on_gpu(LENGTHS) if packed else None)
    upstream = torch.randn(exact.shape, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad(exact, doubles, upstream)
    rounded_gradients = torch.autograd.grad(rounded, halves, upstream.cuda().bfloat16())
    for ours, theirs in zip((rounded, *rounded_gradients), (exact, *gradients), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.cpu().double() - theirs).norm() < 0.01 * theirs.norm()


def test_mosa_inside_documents_on_the_gpu_equals_the_cpu() -> None:
    cpu = make_inputs(3, 256, 3, 32, 16)
    gpu = [tensor.detach().cuda() for tensor in cpu]
    options: dict = dict(num_selected=lambda length: max(length // 4, 1), include_first_token=True)
    expected = mosa_attention(*cpu, documents=pack(LENGTHS), **options)
    found = mosa_attention(*gpu, documents=on_gpu(LENGTHS), **options)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-11)
