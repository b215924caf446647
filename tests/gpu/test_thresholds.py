"""Selection by thresholds on the GPU, against the naive path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_mosa.attention import mosa_attention
from megatron_mosa.kernels import Documents, KernelBackend, get_backend, naive
from megatron_mosa.kernels.triton import scattered
from tests.kernels.test_documents import pack
from tests.kernels.test_naive import make_inputs
from tests.kernels.test_thresholds import select_above
from tests.kernels.test_triton import errors


@pytest.fixture
def fused() -> Iterator[KernelBackend]:
    """Triton's backend; torch fills new memory with NaN meanwhile."""
    torch.use_deterministic_algorithms(True)
    yield get_backend("triton", torch.empty(0, device="cuda"))
    torch.use_deterministic_algorithms(False)


def make_scores(length: int, batch: int = 3, heads: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    scores = (2 * torch.randn(batch, heads, length, generator=generator)).sigmoid()
    scores[0, 1, ::7] = scores[0, 1, 0].item()  # ties
    scores[1, 2, ::5] = torch.nan
    return scores.cuda()


@pytest.mark.parametrize("feedback", [0.0, 0.1, 5.0])
@pytest.mark.parametrize("length", [1, 33, 1024, 5000])
def test_selection_equals_the_naive_one(fused: KernelBackend, length: int, feedback: float) -> None:
    scores, thresholds = make_scores(length), torch.tensor([0.1, 0.5, 0.9, 0.97, 0.999], device="cuda")
    for starts in (
        None,
        pack([[length]] * 3).starts.cuda(),
        pack([[length - length // 3, length // 3]] * 3).starts.cuda(),
    ):
        options = (starts, feedback, 1 / 16)
        counts = naive.count_above(scores, thresholds, *options)
        assert torch.equal(fused.count_above(scores, thresholds, *options).long(), counts)
        for capacity in {1, max(1, length // 8), length, None}:
            both = [select_above(kernels, scores, thresholds, capacity, *options) for kernels in (fused, naive)]
            assert torch.equal(*both)


@pytest.mark.parametrize("length", [1, 100, 3000])
def test_scores_are_counted_as_by_the_naive_path(fused: KernelBackend, length: int) -> None:
    scores = make_scores(length)
    ours, theirs = (torch.zeros(5, naive.HISTOGRAM_BINS, dtype=torch.int32, device="cuda") for _ in range(2))
    fused.count_scores(scores, ours)
    naive.count_scores(scores, theirs)
    assert torch.equal(ours.sum(-1), theirs.sum(-1))
    assert (ours.cumsum(-1) - theirs.cumsum(-1)).abs().max() <= 2  # rounding at the bounds of bins


@pytest.mark.parametrize("small_bytes", [scattered.SMALL_BYTES, 0])  # all in one chunk; sequences or columns in several
@pytest.mark.parametrize("head_dim", [36, 64, 128])  # by pointers; by descriptors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_rows_whose_number_differs(
    fused: KernelBackend, dtype: torch.dtype, head_dim: int, small_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads with one row a sequence, with all that the capacity allows, and with several tiles and a remainder."""
    monkeypatch.setattr(scattered, "SMALL_BYTES", small_bytes)
    inputs = [tensor.detach().cuda() for tensor in make_inputs(6, 1024, 24, 512, head_dim)]
    scores = naive.router_scores(*inputs[:2]).float()
    thresholds = scores.transpose(0, 1).flatten(1).quantile(0.92, dim=1)
    thresholds[0], thresholds[1] = 1.0, 0.0
    ours, naives = errors(fused, inputs, fused.select_above(scores, thresholds, 100), dtype)
    assert max(ours) < 1e-5 if dtype == torch.float32 else all(a < 2 * b for a, b in zip(ours, naives, strict=True))


@pytest.mark.parametrize("feedback", [0.0, 0.2])
@pytest.mark.parametrize("documents", [False, True])
def test_the_layer_and_its_gradients(fused: KernelBackend, feedback: float, documents: bool) -> None:
    """Capacity that binds and slots that stay empty, in fp32."""
    inputs = [tensor.detach().float().cuda().requires_grad_() for tensor in make_inputs(3, 300, 6, 64, 32)]
    thresholds = torch.tensor([0.2, 0.5, 0.6, 0.7, 0.9, 0.99], device="cuda")
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).cuda()
    packed = (
        Documents.from_starts(pack([[100, 200], [300], [1, 299]]).starts, torch.device("cuda")) if documents else None
    )
    both = []
    for backend in ("naive", "triton"):
        output = mosa_attention(
            *inputs, thresholds=thresholds, capacity=60, feedback=feedback, share=0.1 if feedback else 0.0,
            documents=packed, backend=backend,
        )  # fmt: skip
        both.append([output, *torch.autograd.grad(output, inputs, upstream)])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * theirs.abs().max().item())
