"""Kernels that go over a sequence block by block, with blocks so small that short sequences have many of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_mosa.kernels import KernelBackend, get_backend, naive
from megatron_mosa.kernels.triton import selection, tiles
from tests.kernels.reference import choose
from tests.kernels.test_documents import pack
from tests.kernels.test_thresholds import expected, select_above

BLOCK = 16  # the least: counts are summed in rows of 16


class Roomy:
    """torch, but new tensors have room behind them: what a kernel writes too much does no harm before it is found."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, shape: tuple[int, ...], **options: Any) -> torch.Tensor:
        size = math.prod(shape)
        return torch.empty(size + 1000, **options)[:size].view(shape)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelBackend]:
    """The kernels with these blocks; torch fills new memory with NaN."""

    def block(length: int) -> dict[str, int]:
        return dict(BLOCK=BLOCK, num_warps=1)

    for name in ("selection", "select_above", "follow", "count_scores"):
        monkeypatch.setattr(tiles, name, block)
    monkeypatch.setattr(selection, "torch", Roomy())
    torch.use_deterministic_algorithms(True)
    yield get_backend("triton", torch.empty(0))
    torch.use_deterministic_algorithms(False)


def scores_with_ties() -> torch.Tensor:
    """Return scores [1, 2, 37] with few values, so that every block has ties at the limit of a selection."""
    return torch.randint(1, 4, (1, 2, 37), generator=torch.Generator().manual_seed(0)) / 5


@pytest.mark.parametrize("include_first_token", [False, True])
def test_of_equal_scores_the_earlier_are_selected(fused: KernelBackend, include_first_token: bool) -> None:
    rising = torch.arange(1, 38) / 40
    slopes = torch.stack((rising, rising.roll(-5))).unsqueeze(0)  # the largest, and the smallest, in the last block
    for scores in (scores_with_ties(), slopes, torch.full((1, 1, 2 * BLOCK), 0.5)):
        length = scores.shape[-1]
        for num_selected in (1, BLOCK + 1, length - 1):
            indices = fused.select_tokens(scores, num_selected, include_first_token)[0]
            included = [0] * include_first_token
            for row, found in zip(scores[0].tolist(), indices.tolist(), strict=True):
                assert found == choose(row, num_selected, included), (num_selected, row)


@pytest.mark.parametrize("feedback", [0.0, 0.3])
def test_thresholds_do_not_see_blocks(fused: KernelBackend, feedback: float) -> None:
    lengths = [[37], [15, 1, 1, 20]]  # documents begin at the end of a block, and at the next
    scores = torch.cat((scores_with_ties(), torch.rand(1, 2, 37, generator=torch.Generator().manual_seed(0))))
    thresholds = torch.tensor([0.3, 0.4])
    for starts in (None, pack(lengths).starts):
        options: Any = (starts, feedback, 0.2)
        for capacity in (BLOCK + 1, None):
            found = select_above(fused, scores, thresholds, capacity, *options)
            assert found.tolist() == expected(scores, thresholds, capacity, *options)
        counts = [[sum(t < 37 for t in row) for row in rows] for rows in expected(scores, thresholds, None, *options)]
        assert fused.count_above(scores, thresholds, *options).tolist() == counts


def test_every_block_is_counted(fused: KernelBackend) -> None:
    scores = torch.rand(2, 3, 37, generator=torch.Generator().manual_seed(0))
    histograms = torch.zeros(2, 3, 128, dtype=torch.int32)
    fused.count_scores(scores, histograms[0])
    naive.count_scores(scores, histograms[1])
    assert torch.equal(*histograms) and histograms[0].sum() == scores.numel()
