"""Selection by thresholds in both backends, and the histogram of scores, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_mosa.attention import mosa_attention
from megatron_mosa.attention.thresholds import quantile_of, share_above
from megatron_mosa.kernels import Documents, KernelBackend, get_backend, naive
from megatron_mosa.kernels.triton import tiles
from tests.kernels.reference import mosa_reference
from tests.kernels.test_documents import pack
from tests.kernels.test_naive import make_inputs


@pytest.fixture(params=["naive", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[KernelBackend]:
    """A backend with blocks of 16 scores; torch fills new memory with NaN, so that unwritten values are noticed."""
    request.getfixturevalue("small_tiles")
    torch.use_deterministic_algorithms(True)
    yield get_backend(request.param, torch.empty(0))
    torch.use_deterministic_algorithms(False)


def select_above(
    kernels: KernelBackend, scores: torch.Tensor, thresholds: torch.Tensor, capacity: int | None, *options: Any
) -> torch.Tensor:
    """Select by thresholds; a capacity of None is the largest number of tokens that a head selects."""
    if capacity is None:
        capacity = int(kernels.count_above(scores, thresholds, *options).max())
    return kernels.select_above(scores, thresholds, capacity, *options)


def expected(
    scores: torch.Tensor,
    thresholds: torch.Tensor,
    capacity: int | None,
    starts: torch.Tensor | None = None,
    feedback: float = 0.0,
    share: float = 0.0,
) -> list[list[list[int]]]:
    """Select tokens one by one, and fill empty slots with T."""

    def is_above(score: float, threshold: float, excess: float) -> bool:
        if not feedback:
            return score > threshold
        return score > 0 and math.log(score / (1 - score)) > math.log(threshold / (1 - threshold)) + feedback * excess

    chosen = []
    for b, sequence in enumerate(scores.tolist()):
        chosen.append([])
        for row, threshold in zip(sequence, thresholds.tolist(), strict=True):
            taken: list[int] = []
            for t, score in enumerate(row):
                start = 0 if starts is None else int(starts[b, t])
                excess = sum(before >= start for before in taken) - share * (t - start)
                if t == start or is_above(score, threshold, excess):
                    taken.append(t)
            taken = taken[:capacity]
            chosen[-1].append(taken)
    slots = capacity or max(len(taken) for rows in chosen for taken in rows)
    return [[taken + [scores.shape[-1]] * (slots - len(taken)) for taken in rows] for rows in chosen]


def cases() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ties = torch.randint(0, 5, (2, 3, 37), generator=generator) / 5  # two blocks and a remainder
    wrong = torch.rand(2, 3, 40, generator=generator)
    wrong[0, :, ::3], wrong[1, 1] = torch.nan, torch.nan
    return {
        "ties": (ties, torch.tensor([0.2, 0.4, 0.8])),
        "none": (torch.rand(2, 2, 17, generator=generator), torch.tensor([1.0, 0.999999])),
        "all": (torch.rand(1, 2, 32, generator=generator), torch.tensor([-1.0, 0.0])),
        "nan": (wrong, torch.tensor([0.3, 0.5, 0.7])),
        "one token": (torch.rand(3, 2, 1, generator=generator), torch.tensor([0.0, 1.0])),
        "many blocks": (torch.rand(1, 2, 150, generator=generator), torch.tensor([0.1, 0.97])),
    }


@pytest.mark.parametrize("name", cases())
def test_selection_equals_a_plain_loop(kernels: KernelBackend, name: str) -> None:
    scores, thresholds = cases()[name]
    for capacity in {1, 2, 31, scores.shape[-1], None}:
        if capacity is None or capacity <= scores.shape[-1]:
            indices = select_above(kernels, scores, thresholds, capacity)
            assert indices.dtype == torch.int64 and indices.is_contiguous()
            assert indices.tolist() == expected(scores, thresholds, capacity)


def test_the_first_token_of_each_document_is_taken(kernels: KernelBackend) -> None:
    generator = torch.Generator().manual_seed(1)
    starts = pack([[1, 12, 1, 1, 2], [17], [5, 12]]).starts
    scores, thresholds = torch.rand(3, 4, 17, generator=generator), torch.tensor([0.1, 0.5, 0.9, 1.0])
    for capacity in (2, 5, 17, None):
        indices = select_above(kernels, scores, thresholds, capacity, starts)
        assert indices.tolist() == expected(scores, thresholds, capacity, starts)


@pytest.mark.parametrize(("length", "feedback"), [(1, 1.0), (33, 0.05), (33, 1.0), (33, 30.0)])
def test_feedback_equals_a_plain_loop(kernels: KernelBackend, feedback: float, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    scores = (2 * torch.randn(2, 3, length, generator=generator)).sigmoid()
    scores[1, 1, ::5] = torch.nan
    thresholds = torch.tensor([0.2, 0.8, 0.97])
    lengths = [[length], [length // 3, length - length // 3]] if length > 1 else [[1], [1]]
    for starts in (None, Documents.from_lengths(lengths).starts):
        counts = kernels.count_above(scores, thresholds, starts, feedback, 0.1)
        for capacity in {1, max(1, length // 12), length, None}:
            indices = select_above(kernels, scores, thresholds, capacity, starts, feedback, 0.1)
            assert indices.tolist() == expected(scores, thresholds, capacity, starts, feedback, 0.1)
        all_taken = expected(scores, thresholds, None, starts, feedback, 0.1)
        assert counts.tolist() == [[sum(t < length for t in taken) for taken in rows] for rows in all_taken]


def test_feedback_holds_the_load_of_every_sequence() -> None:
    """In sequences whose scores are all high or all low, a head selects about its share, not all or nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 2048, generator=generator) + torch.tensor([-2.0, 0.0, 1.0, 3.0])[:, None, None]
    thresholds = torch.tensor([0.8, 0.9])
    plain = naive.count_above(logits.sigmoid(), thresholds)
    followed = naive.count_above(logits.sigmoid(), thresholds, None, 0.1, 1 / 16)
    assert plain.min() < 64 and plain.max() > 1000  # the share is 128
    # The threshold of a head that is n tokens ahead is 0.1 n higher, and soon above all its scores.
    assert (followed - 128).abs().max() <= 75


def test_strides_do_not_matter(kernels: KernelBackend) -> None:
    scores, thresholds = cases()["ties"]
    strided = scores.mT.contiguous().mT
    assert torch.equal(kernels.select_above(strided, thresholds, 7), kernels.select_above(scores, thresholds, 7))


@pytest.mark.parametrize("capacity", [4, None])
def test_output_and_gradients_equal_the_independent_loop(capacity: int | None) -> None:
    """The selected tokens alone form a sequence that the reference selects completely: it has no thresholds."""
    inputs = make_inputs(1, 15, 1, 6, 4)
    scores = naive.router_scores(inputs[0], inputs[1]).detach()
    for share in (0.2, 0.6):
        threshold = scores.quantile(1 - share).reshape(1)
        (taken,) = expected(scores, threshold, None)[0][:1]
        taken = taken[:capacity]
        alone = mosa_reference(
            inputs[0][:, taken], *inputs[1:], num_selected=len(taken), include_first_token=True,
            rotary_percent=0.0, rotary_base=100.0,
        )  # fmt: skip
        output = mosa_attention(*inputs, thresholds=threshold, capacity=capacity, rotary_percent=0.0)
        torch.testing.assert_close(output[:, taken], alone, rtol=1e-10, atol=1e-12)
        assert output[:, [t for t in range(15) if t not in taken]].abs().max() == 0
        found = torch.autograd.grad(output.square().sum(), inputs)
        for ours, theirs in zip(found, torch.autograd.grad(alone.square().sum(), inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_both_backends_compute_the_same_layer() -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(2, 9, 2, 10, 6)]
    thresholds = torch.tensor([0.3, 0.7])
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    documents = Documents.from_lengths([[3, 6], [5, 4]])
    for options in (dict(capacity=3), dict(capacity=None), dict(capacity=4, documents=documents)):
        both = []
        for backend in ("naive", "triton"):
            output = mosa_attention(*inputs, thresholds=thresholds, backend=backend, **options)  # type: ignore[arg-type]
            both.append([output, *torch.autograd.grad(output, inputs, upstream)])
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["naive", "triton"])
def test_outputs_do_not_depend_on_later_tokens(backend: str) -> None:
    inputs = [tensor.detach().float() for tensor in make_inputs(2, 10, 2, 8, 4)]
    changed = [inputs[0].clone(), *inputs[1:]]
    changed[0][:, 5:] = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5))

    def outputs(**options: Any) -> list[torch.Tensor]:
        return [mosa_attention(*tensors, **options, backend=backend) for tensors in (inputs, changed)]

    for capacity in (4, None):
        before, after = outputs(thresholds=torch.full((2,), 0.55), capacity=capacity)
        torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(before[:, 5:], after[:, 5:])
    before, after = outputs(num_selected=4)
    assert not torch.allclose(before[:, :5], after[:, :5])  # expert choice depends on later tokens


def test_scores_are_counted_by_their_logits(kernels: KernelBackend) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(5, 3, 70, generator=generator)
    logits[0, 0, :4] = torch.tensor([-40.0, 40.0, torch.inf, -torch.inf])
    scores = logits.sigmoid()
    scores[1, 1, 5] = torch.nan
    histogram = torch.ones(3, naive.HISTOGRAM_BINS, dtype=torch.int32)
    kernels.count_scores(scores, histogram)
    counts = torch.zeros_like(histogram)
    for b, e, t in torch.cartesian_prod(*map(torch.arange, scores.shape)).tolist():
        score = float(scores[b, e, t])
        logit = -math.inf if not score > 0 else math.inf if score == 1 else math.log(score) - math.log1p(-score)
        position = (logit + naive.HISTOGRAM_LOGITS) * naive.HISTOGRAM_BINS / (2 * naive.HISTOGRAM_LOGITS)
        counts[e, int(min(max(position, 0), naive.HISTOGRAM_BINS - 1))] += 1
    found = histogram - 1
    assert torch.equal(found.sum(-1), torch.full((3,), 350))
    assert (found.cumsum(-1) - counts.cumsum(-1)).abs().max() <= 1  # rounding at the bounds of bins
    assert (found - counts).abs().sum() <= 4


def test_quantile_and_share_are_inverses_and_accurate_within_a_bin() -> None:
    scores = (2 * torch.randn(4, 6, 500, generator=torch.Generator().manual_seed(3))).sigmoid()
    histogram = torch.zeros(6, naive.HISTOGRAM_BINS, dtype=torch.int32)
    naive.count_scores(scores, histogram)
    width = 2 * naive.HISTOGRAM_LOGITS / naive.HISTOGRAM_BINS
    for share in (1 / 2, 1 / 7, 1 / 32, 1 / 256):
        quantile = quantile_of(histogram, share)
        exact = scores.double().transpose(0, 1).flatten(1).quantile(1 - share, dim=1, interpolation="lower")
        assert (torch.logit(quantile) - torch.logit(exact)).abs().max() < 2 * width
        torch.testing.assert_close(share_above(histogram, quantile), torch.full((6,), share, dtype=torch.float64))
    assert torch.equal(share_above(histogram, torch.zeros(6)), torch.ones(6, dtype=torch.float64))
    assert not share_above(histogram, torch.ones(6)).any()


def test_all_scores_in_one_bin_are_split_by_interpolation() -> None:
    histogram = torch.zeros(1, naive.HISTOGRAM_BINS, dtype=torch.int32)
    naive.count_scores(torch.full((1, 1, 64), 0.501), histogram)
    low, high = (torch.logit(quantile_of(histogram, share)).item() for share in (0.75, 0.25))
    width = 2 * naive.HISTOGRAM_LOGITS / naive.HISTOGRAM_BINS
    assert (low, high) == pytest.approx((0.25 * width, 0.75 * width), rel=1e-6)


def test_schemas_and_fake_kernels_of_the_operators() -> None:
    scores, thresholds = cases()["ties"]
    starts = pack([[18, 19]] * 2).starts
    histogram = torch.zeros(3, naive.HISTOGRAM_BINS, dtype=torch.int32)
    operators = torch.ops.megatron_mosa
    get_backend("triton", scores)
    for operator, arguments in (
        (operators.select_above, (scores.mT.contiguous().mT, thresholds, 7, starts, 0.0, 0.0)),
        (operators.fused_select_above, (scores, thresholds, 7, starts, 0.0, 0.0)),
        (operators.fused_select_above, (scores, thresholds, 7, None, 0.1, 0.25)),
        (operators.fused_count_scores, (scores, histogram)),
    ):
        found = torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
        assert found == {"test_schema": "SUCCESS", "test_faketensor": "SUCCESS"}


@pytest.mark.parametrize("length", [1, 16, 100, 1024, 8192, 100_000])
def test_tiles(length: int) -> None:
    for chosen in (tiles.select_above(length), tiles.follow(length), tiles.count_scores(length)):
        assert chosen["BLOCK"] & (chosen["BLOCK"] - 1) == 0 and chosen["num_warps"] in (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_selected=3), "num_selected and thresholds are both given"),
        (dict(thresholds=None), "num_selected and thresholds are both None"),
        (dict(thresholds=torch.zeros(3, dtype=torch.float64)), r"thresholds have shape \(3,\) on cpu; expected \(2,\)"),
        (dict(thresholds=torch.zeros(2)), "thresholds are torch.float32; expected torch.float64, as the scores"),
        (dict(capacity=0), "capacity=0; expected an integer from 1 to T=8"),
        (dict(capacity=9), "capacity=9"),
        (dict(capacity=2.0), "capacity=2.0; expected an integer"),
        (dict(thresholds=[0.5, 0.5]), r"thresholds are a list; expected a tensor of shape \(2,\)"),
        (dict(thresholds=None, num_selected=3, capacity=4), "capacity=4 is for thresholds"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    names = ("hidden_states", "router_weight", "qkv_weight", "proj_weight")
    arguments = dict(zip(names, make_inputs(1, 8, 2, 4, 4), strict=True))
    arguments |= dict(thresholds=torch.zeros(2, dtype=torch.float64)) | change
    with pytest.raises(ValueError, match=message):
        mosa_attention(**arguments)


def test_a_batch_of_no_sequences() -> None:
    inputs = [tensor.detach() for tensor in make_inputs(1, 8, 2, 4, 4)]
    output = mosa_attention(inputs[0][:0], *inputs[1:], thresholds=torch.zeros(2, dtype=torch.float64))
    assert output.shape == (0, 8, 4)
