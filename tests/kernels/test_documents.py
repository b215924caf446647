"""Attention inside documents against loops and score matrices written out, in value and in gradient."""

from __future__ import annotations

import pytest
import torch

from megatron_mosa.attention import mosa_attention, num_selected_tokens
from megatron_mosa.kernels import Documents, naive
from megatron_mosa.kernels.documents import document_attention
from megatron_mosa.kernels.window import sliding_window_attention
from tests.kernels.reference import choose, largest_saved, mosa_reference
from tests.kernels.test_naive import make_inputs

LENGTHS = [[5, 1, 7, 4], [17], [1] * 17, [9, 8]]  # of the documents of four sequences of 17 tokens


def pack(lengths: list[list[int]]) -> Documents:
    starts = [[sum(row[:i]) for i, length in enumerate(row) for _ in range(length)] for row in lengths]
    return Documents.from_starts(torch.tensor(starts))


def owners(lengths: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[i for i, length in enumerate(row) for _ in range(length)] for row in lengths])


def check_equal(output: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(output, inputs, upstream)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        assert reference.norm() > 0
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1) @ value


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 17, 20])
def test_documents_of_every_few_tokens(stride: int) -> None:
    """Tokens of the same document stay together, and documents without any disappear or are empty."""
    documents, owner = pack(LENGTHS), owners(LENGTHS)[:, ::stride]
    number = owner.shape[1]
    firsts = torch.stack([(row == row[:, None]).long().argmax(-1) for row in owner])  # [B, k]
    found = documents.strided(stride)
    assert torch.equal(found.starts, firsts)
    assert found.lengths == tuple(tuple((row == n).sum().item() for n in row.unique()) for row in owner)
    packed = documents.packed(40).strided(stride)
    assert torch.equal(packed.starts, firsts) and packed.max_seqlen == number
    assert packed.cu_seqlens.dtype == torch.int32 and len(packed.cu_seqlens) == 41
    assert packed.cu_seqlens.unique().tolist() == found.cu_seqlens.tolist()


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_dense_attention_stays_inside_documents(groups: int) -> None:
    inputs = [draw(4, 4, 17, 8, seed=1), draw(4, groups, 17, 8, seed=2), draw(4, groups, 17, 8, seed=3)]
    owner = owners(LENGTHS)
    visible = (owner.unsqueeze(-1) == owner.unsqueeze(-2)).tril()
    check_equal(document_attention(*inputs, pack(LENGTHS)), masked_attention(*inputs, visible), inputs)


@pytest.mark.parametrize("window", [2, 3, 5, 8, 16, 17, 40])
def test_windows_stay_inside_documents(window: int) -> None:
    inputs = [draw(4, 2, 17, 8, seed=seed) for seed in range(3)]
    owner, positions = owners(LENGTHS), torch.arange(17)
    near = positions[:, None] - positions[None] < window
    visible = (owner.unsqueeze(-1) == owner.unsqueeze(-2)).tril() & near
    output = sliding_window_attention(*inputs, window, pack(LENGTHS))
    check_equal(output, masked_attention(*inputs, visible), inputs)


def test_no_tensor_grows_with_the_square_of_the_length() -> None:
    length, size, window = 4096, 32, 16
    documents = pack([[size] * (length // size)])
    query = torch.randn(1, 1, length, 8, requires_grad=True)
    dense = largest_saved(lambda: document_attention(query, query, query, documents))
    local = largest_saved(lambda: sliding_window_attention(query, query, query, window, documents))
    assert 0 < dense <= 4 * length * size and 0 < local <= 4 * length * window


@pytest.mark.parametrize("restart_rotary", [False, True])
@pytest.mark.parametrize("include_first_token", [False, True])
@pytest.mark.parametrize("scope", ["sequence", "document"])
def test_mosa_equals_the_independent_loop(scope: str, include_first_token: bool, restart_rotary: bool) -> None:
    inputs = make_inputs(4, 17, 3, 6, 4)
    options = dict(
        num_selected=5 if scope == "sequence" else lambda length: num_selected_tokens(length, 3.0),
        include_first_token=include_first_token,
        rotary_percent=0.5,
        rotary_base=100.0,
        restart_rotary=restart_rotary,
    )
    output = mosa_attention(*inputs, documents=pack(LENGTHS), **options)
    check_equal(output, mosa_reference(*inputs, lengths=LENGTHS, **options), inputs)


@pytest.mark.parametrize("include_first_token", [False, True])
def test_selection_per_document_on_many_ties(include_first_token: bool) -> None:
    lengths = [[40, 3, 1, 1, 2, 54], [101], [50, 51]]
    scores = torch.randint(0, 5, (3, 4, 101), generator=torch.Generator().manual_seed(0)) / 5
    documents = pack(lengths)
    selection = documents.selection(lambda length: num_selected_tokens(length, 4.0))
    slots = selection.num_slots
    assert slots == 10 + 2 + 1 + 1 + 2 + 13
    assert selection.slots.lengths == ((10, 2, 1, 1, 2, 13), (25, 4), (12, 12, 5))
    indices = naive.select_tokens(scores, slots, include_first_token, documents.starts, selection.quotas)
    for b, e in ((b, e) for b in range(3) for e in range(4)):
        expected, first = [], 0
        for length in lengths[b]:
            own = scores[b, e, first : first + length].tolist()
            included = [0] * include_first_token
            expected += [first + t for t in choose(own, num_selected_tokens(length, 4.0), included)]
            first += length
        assert indices[b, e].tolist() == expected + [101] * (slots - len(expected))


def test_packed_documents_are_documents_alone() -> None:
    rule = lambda length: num_selected_tokens(length, 3.0)  # noqa: E731
    inputs = make_inputs(1, 17, 3, 6, 4)
    for lengths in LENGTHS:
        packed = mosa_attention(
            *inputs, num_selected=rule, include_first_token=True, restart_rotary=True, documents=pack([lengths])
        )
        alone = [
            mosa_attention(part, *inputs[1:], num_selected=rule(part.shape[1]), include_first_token=True)
            for part in inputs[0].split(lengths, dim=1)
        ]
        check_equal(packed, torch.cat(alone, dim=1), inputs)


def test_restarting_rotary_positions_changes_rounding_alone() -> None:
    # Rotation makes a product depend on the distance of two positions, which a common origin does not change.
    inputs = make_inputs(4, 17, 3, 6, 4)
    outputs = [
        mosa_attention(*inputs, num_selected=9, documents=pack(LENGTHS), restart_rotary=restart)
        for restart in (False, True)
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-12)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    "starts", [[[1, 1, 2]], [[0, 0, 1]], [[0, 2, 2]], [[0, 1, 0]], [[0, -1, 2]]], ids=lambda rows: str(rows[0])
)
def test_starts_that_no_documents_have_are_refused(starts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="must be 0 for the first token"):
        Documents.from_starts(torch.tensor(starts))


def test_many_short_documents_make_no_square_of_the_length() -> None:
    length = 2048
    inputs = make_inputs(1, length, 1, 8, 8)
    rule = lambda size: num_selected_tokens(size, 16.0)  # noqa: E731
    documents = pack([[2] * (length // 2)])
    largest = largest_saved(lambda: mosa_attention(*inputs, num_selected=rule, documents=documents))
    assert 0 < largest <= 32 * length  # every token is selected here


def test_bad_arguments_are_named() -> None:
    inputs = make_inputs(1, 8, 2, 4, 4)
    with pytest.raises(ValueError, match="5 of 4 tokens of a document cannot be selected"):
        mosa_attention(*inputs, num_selected=lambda length: 5, documents=pack([[4, 4]]))
    with pytest.raises(ValueError, match="2.0 of 4 tokens of a document .*; expected an integer from 1 to 4"):
        mosa_attention(*inputs, num_selected=lambda length: length / 2, documents=pack([[4, 4]]))
    for lengths in ([[4, 4], [7]], [[-4, 12]], [[0, 8]], [[4.0, 4.0]], [["8"]], [8, 8], [[]], []):
        with pytest.raises(ValueError, match="expected lengths of 1 or more with the same sum in every sequence"):
            Documents.from_lengths(lengths)
    with pytest.raises(ValueError, match="documents=PackedDocuments, whose lengths the host does not know"):
        mosa_attention(*inputs, num_selected=lambda length: 2, documents=pack([[4, 4]]).packed(4))
    with pytest.raises(ValueError, match="expected torch.int64"):
        Documents.from_starts(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"documents are of \(1, 7\) tokens"):
        mosa_attention(*inputs, num_selected=2, documents=pack([[3, 4]]))
    with pytest.raises(ValueError, match="documents=None"):
        mosa_attention(*inputs, num_selected=lambda length: 2)
