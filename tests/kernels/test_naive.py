"""The naive kernels against an independent loop, in value and in gradient."""

from __future__ import annotations

import re

import pytest
import torch

from megatron_mosa.attention import mosa_attention, num_selected_tokens
from megatron_mosa.kernels import naive
from tests.kernels.reference import choose, mosa_reference


def make_inputs(batch: int, length: int, heads: int, width: int, head_dim: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, dtype=torch.float64, generator=generator) * scale).requires_grad_()

    return [
        draw(batch, length, width),
        draw(heads, width, scale=width**-0.5),
        draw(heads, width, 3 * head_dim, scale=width**-0.5),
        draw(heads, head_dim, width, scale=head_dim**-0.5),
    ]


@pytest.mark.parametrize("include_first_token", [False, True])
@pytest.mark.parametrize("rotary_percent", [0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "head_dim", "num_selected"),
    [(2, 2, 1, 3, 2, 2), (1, 7, 3, 5, 6, 3), (2, 13, 2, 8, 4, 5), (1, 9, 2, 4, 8, 9), (1, 6, 2, 4, 4, 1)],
)
def test_output_and_gradients_equal_the_independent_loop(
    batch: int,
    length: int,
    heads: int,
    width: int,
    head_dim: int,
    num_selected: int,
    rotary_percent: float,
    include_first_token: bool,
) -> None:
    options = dict(
        num_selected=num_selected,
        include_first_token=include_first_token,
        rotary_percent=rotary_percent,
        rotary_base=100.0,
    )
    inputs = make_inputs(batch, length, heads, width, head_dim)
    output = mosa_attention(*inputs, **options, backend="naive")
    expected = mosa_reference(*inputs, **options)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)

    upstream = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(output, inputs, upstream)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert reference.norm() > 0
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("include_first_token", [False, True])
def test_gradcheck(include_first_token: bool) -> None:
    inputs = make_inputs(2, 7, 2, 4, 4)
    scores = naive.router_scores(inputs[0], inputs[1]).detach().sort(dim=-1).values
    assert (scores[..., 1:] - scores[..., :-1]).min() > 1e-4  # no step of gradcheck changes the selection

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return mosa_attention(*tensors, num_selected=3, include_first_token=include_first_token)

    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6)


def test_selection_is_sorted_and_ties_go_to_the_earlier_token() -> None:
    scores = torch.tensor([[[0.5, 0.9, 0.5, 0.9, 0.5, 0.1], [0.3] * 6]])
    assert naive.select_tokens(scores, 3).tolist() == [[[0, 1, 3], [0, 1, 2]]]
    assert naive.select_tokens(scores, 4).tolist() == [[[0, 1, 2, 3], [0, 1, 2, 3]]]


def test_equal_tokens_have_equal_scores_wherever_they_stand() -> None:
    """A product of matrices treats its last rows otherwise, so that equal tokens' scores differed by rounding."""
    generator = torch.Generator().manual_seed(0)
    tokens, router = torch.randn(20, 64, generator=generator), torch.randn(8, 64, generator=generator) / 8
    single = naive.router_scores(tokens[None], router)[0]  # [E, 20]
    for length in (*range(1, 41), 127):
        ids = torch.randint(20, (3, length), generator=generator)
        states = tokens[ids]
        assert torch.equal(naive.router_scores(states, router), single[:, ids].transpose(0, 1))
        assert torch.equal(naive.router_scores(states[:1], router)[0], single[:, ids[0]])


@pytest.mark.parametrize("options", [{"num_selected": 3}, {"thresholds": torch.full((2,), 0.5).double()}], ids=str)
def test_torch_func_gives_the_gradient_of_backward(options: dict) -> None:
    states, *weights = make_inputs(2, 7, 2, 4, 4)

    def loss(states: torch.Tensor) -> torch.Tensor:
        return mosa_attention(states, *weights, **options, backend="naive").square().sum()

    expected = torch.autograd.grad(loss(states), states)[0]
    torch.testing.assert_close(torch.func.grad(loss)(states.detach()), expected, rtol=0, atol=0)
    direction = torch.randn(states.shape, dtype=states.dtype, generator=torch.Generator().manual_seed(1))
    _, change = torch.func.jvp(loss, (states.detach(),), (direction,))
    torch.testing.assert_close(change, (expected * direction).sum())


@pytest.mark.parametrize("include_first_token", [False, True])
def test_selection_equals_a_plain_ranking_on_many_ties(include_first_token: bool) -> None:
    scores = torch.randint(0, 5, (3, 4, 101), generator=torch.Generator().manual_seed(0)) / 5
    for num_selected in (1, 2, 31, 100, 101):
        indices = naive.select_tokens(scores, num_selected, include_first_token)
        for b in range(3):
            for e in range(4):
                assert indices[b, e].tolist() == choose(scores[b, e].tolist(), num_selected, [0] * include_first_token)


def test_the_selection_is_contiguous_as_its_fake_kernel_says() -> None:
    """Compiled programs rely on contiguous indices."""
    scores = torch.rand(2, 8, 3).transpose(1, 2)
    starts, quotas = torch.zeros(2, 8, dtype=torch.int64), torch.full((2, 8), 4)
    for options in ((), (True, starts), (True, starts, quotas)):
        found = torch.library.opcheck(naive.select_tokens, (scores, 4, *options), test_utils="test_faketensor")
        assert found == {"test_faketensor": "SUCCESS"}


def test_first_token_is_included_whatever_its_score_and_keeps_its_own_gate() -> None:
    inputs = make_inputs(1, 8, 1, 4, 4)
    with torch.no_grad():
        inputs[0][0, 0] = -10 * inputs[1][0] / inputs[1][0].norm() ** 2  # score sigmoid(-10)
    scores = naive.router_scores(inputs[0], inputs[1])
    assert scores[0, 0].argmin() == 0
    assert naive.select_tokens(scores, 2, True)[0, 0, 0] == 0
    without = mosa_attention(*inputs, num_selected=2)
    assert without[0, 0].abs().max() == 0
    included = mosa_attention(*inputs, num_selected=2, include_first_token=True)
    assert 0 < included[0, 0].abs().max() < 1e-3  # gated by its own small score


def test_tokens_that_no_head_selects_get_nothing() -> None:
    inputs = make_inputs(1, 20, 2, 8, 4)
    output = mosa_attention(*inputs, num_selected=3)
    chosen = set(naive.select_tokens(naive.router_scores(inputs[0], inputs[1]), 3).flatten().tolist())
    for t in range(20):
        assert (output[0, t].abs().max() > 0) == (t in chosen)


def test_scores_and_selection_are_fp32_for_bf16_activations() -> None:
    inputs = [tensor.detach().to(torch.bfloat16) for tensor in make_inputs(1, 64, 2, 16, 8)]
    scores = naive.router_scores(inputs[0], inputs[1])
    assert scores.dtype == torch.float32
    exact = torch.sigmoid(torch.einsum("bth,eh->bet", inputs[0].double(), inputs[1].double()))
    torch.testing.assert_close(scores.double(), exact, rtol=1e-6, atol=1e-7)


def test_bf16_stays_close_to_fp64_on_the_same_selection() -> None:
    doubles = make_inputs(2, 63, 3, 32, 16)
    halves = [tensor.detach().to(torch.bfloat16) for tensor in doubles]
    exact = mosa_attention(*[tensor.double() for tensor in halves], num_selected=7)
    rounded = mosa_attention(*halves, num_selected=7)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize(
    ("length", "sparsity", "expected"),
    [(1024, 16, 64), (10, 64, 2), (100, 3, 33), (2, 1, 2), (1000, 7.5, 133), (1, 4, 1)],
)
def test_number_of_selected_tokens(length: int, sparsity: float, expected: int) -> None:
    assert num_selected_tokens(length, sparsity) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_selected=0), "num_selected=0"),
        (dict(num_selected=9), "1 to T=8"),
        (dict(num_selected=4.0), "num_selected=4.0; expected an integer from 1"),
        (dict(num_selected=True), "num_selected=True; expected an integer"),
        (dict(rotary_base=0.0), "rotary_base must be greater than 0 and at most 1000000000000, got 0.0"),
        (dict(documents=torch.zeros(1, 8)), "documents are a Tensor; expected megatron_mosa.kernels.Documents"),
        (dict(backend="cuda"), "backend='cuda'"),
        (dict(rotary_percent=1.5), "rotary_percent must be at least 0 and at most 1, got 1.5"),
        (dict(router_weight=torch.zeros(2, 5, dtype=torch.float64)), "router_weight has shape"),
        (dict(router_weight=torch.zeros(0, 4, dtype=torch.float64)), "E >= 1"),
        (dict(qkv_weight=torch.zeros(2, 4, 13, dtype=torch.float64)), "qkv_weight has shape"),
        (dict(proj_weight=torch.zeros(2, 4, 5, dtype=torch.float64)), "proj_weight has shape"),
        (dict(proj_weight=torch.zeros(2, 4, 4)), "proj_weight is torch.float32"),
        (dict(hidden_states=torch.zeros(8, 4, dtype=torch.float64)), "hidden_states has shape"),
        (
            dict(
                hidden_states=torch.zeros(2, 0, 4, dtype=torch.float64),
                num_selected=None,
                thresholds=torch.zeros(2, dtype=torch.float64),
                feedback=0.1,
            ),
            "hidden_states has shape (2, 0, 4); expected [B, T, h] with T >= 1",
        ),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    names = ("hidden_states", "router_weight", "qkv_weight", "proj_weight")
    arguments = dict(zip(names, make_inputs(1, 8, 2, 4, 4), strict=True)) | dict(num_selected=3) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        mosa_attention(**arguments)
