"""Steps as they are captured, but run one by one in Triton's interpreter; for graphs: tests/gpu/test_decode.py."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.hf import dense_kernels_mosa, graph_mosa, kernels_mosa
from megatron_mosa.hf.dense_kernels_mosa import attend_to_rows
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM
from megatron_mosa.hf.rows_mosa import BLOCK
from tests.decode.models import build, random_tokens

PROMPT, LENGTH = 14, 34  # the dense rows grow, heads fill a block, and room is made twice
KINDS = ["pure", "followed", "hybrid", "grouped", "local", "gated"]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_mosa, "INTERPRETED", True)
    monkeypatch.setattr(kernels_mosa, "ROWS", 16)
    monkeypatch.setattr(kernels_mosa, "WIDTH_BLOCK", 32)
    monkeypatch.setattr(kernels_mosa, "ROUTER_BLOCK", 32)
    monkeypatch.setattr(dense_kernels_mosa, "ROWS", 16)
    monkeypatch.setattr(dense_kernels_mosa, "PROGRAMS", 16)


def decoded(model: MosaForCausalLM, tokens: Tensor, mask: Tensor | None, lengths: list[int]) -> Tensor:
    """Decode pieces of these lengths; return all logits [B, T, V]."""
    cache, logits, start = model.new_cache(), [], 0
    for length in lengths:
        end = start + length
        seen = None if mask is None else mask[:, :end]
        logits.append(model(tokens[:, start:end], attention_mask=seen, **{CACHE: cache}).logits)
        start = end
    return torch.cat(logits, dim=1)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_match_the_forward_pass(kind: str, padded: bool) -> None:
    model, tokens = build(kind, num_hidden_layers=1), random_tokens(2, LENGTH)
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        mask[0, :5] = 0
        mask[1, 20:22] = 0
    expected = model(tokens, attention_mask=mask).logits
    lengths = [PROMPT, *[1] * 10, 3, *[1] * (LENGTH - PROMPT - 13)]  # one piece in between that is not captured
    with mock.patch.object(
        graph_mosa.CapturedSteps, "_step", autospec=True, side_effect=graph_mosa.CapturedSteps._step
    ) as taken:
        found = decoded(model, tokens, mask, lengths)
    assert taken.call_count == lengths.count(1)
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@torch.no_grad()
def test_sequences_are_exchanged_and_caches_copied_between_steps() -> None:
    model, tokens = build("hybrid", num_hidden_layers=1), random_tokens(2, LENGTH)
    order = torch.tensor([1, 1, 0])

    def run() -> list[Tensor]:
        cache = model.new_cache()
        for piece in (tokens[:, :PROMPT], tokens[:, PROMPT : PROMPT + 1]):
            model(piece, **{CACHE: cache})
        other = copy.deepcopy(cache)
        cache.reorder_cache(order)
        return [
            model(piece, **{CACHE: used}).logits
            for column in range(PROMPT + 1, PROMPT + 4)
            for used, piece in ((cache, tokens[order, column, None]), (other, tokens[:, column, None]))
        ]

    captured = run()
    model.captures_steps = False
    for found, expected in zip(captured, run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("change", ["reorder", "piece"])
@torch.no_grad()
def test_there_is_room_after_others_have_changed_the_cache(change: str) -> None:
    model, tokens = build("pure", num_hidden_layers=1, num_mosa_heads=24), random_tokens(2, 300)
    cache, column = model.new_cache(), 43
    for piece in tokens[:, :column].split((40, 1, 1, 1), dim=1):
        model(piece, **{CACHE: cache})
    if change == "reorder":  # allocates as many blocks as are in use
        cache.reorder_cache(torch.tensor([1, 0]))
    else:
        model(tokens[:, column : column + 240], **{CACHE: cache})
        column += 240
    rows = cache.layers[0].mosa
    for end in range(column + 1, column + 9):
        model(tokens[:, end - 1 : end], **{CACHE: cache})
        assert rows.totals[0] <= len(rows.keys) and rows.totals[1] <= BLOCK * (rows.table.shape[2] - 1)


def test_a_branch_is_joined_once_if_it_was_entered() -> None:
    own, side, device = mock.Mock(), mock.Mock(), torch.device("cuda", 0)
    given = {
        "is_current_stream_capturing": lambda: True, "current_stream": lambda _: own, "stream": nullcontext,
        "get_device_properties": lambda _: SimpleNamespace(multi_processor_count=132),
    }  # fmt: skip
    with (
        mock.patch.multiple(torch.cuda, **given),
        mock.patch.object(graph_mosa, "_streams", lambda _: (own, side)),
    ):
        with graph_mosa.Branch(device):
            pass
        with graph_mosa.Branch(device, programs=133) as branch, branch.beside():
            pass
        assert not own.mock_calls and not side.mock_calls  # which is in no graph
        with (
            pytest.raises(ValueError, match="inside"),
            graph_mosa.Branch(device, programs=132) as branch,
            branch.beside(),
        ):
            raise ValueError("inside")
        side.wait_stream.assert_called_once_with(own)
        own.wait_stream.assert_called_once_with(side)


class Adapter(torch.nn.Module):
    """Stands around a module as PEFT's do."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: object, **options: object) -> Tensor:
        return self.module(*arguments, **options)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["fixed", "chosen"])
@torch.no_grad()
def test_heads_without_a_step_are_not_captured(kind: str) -> None:
    model, tokens = build(kind, num_hidden_layers=1), random_tokens(2, PROMPT + 3)
    expected = model(tokens).logits
    with mock.patch.object(graph_mosa.CapturedSteps, "_step") as taken:
        found = decoded(model, tokens, None, [PROMPT, 1, 1, 1])
    assert not taken.called
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["mosa", "dense"])
def test_heads_in_an_adapter_take_part(kind: str) -> None:
    model, tokens = build("hybrid", num_hidden_layers=2), random_tokens(2, PROMPT + 3)
    expected = model(tokens).logits
    attention = model.model.layers[1].self_attn
    setattr(attention, f"{kind}_heads", Adapter(getattr(attention, f"{kind}_heads")))
    cache = model.new_cache()
    found = [model(tokens[:, :PROMPT], **{CACHE: cache}).logits]
    found += [model(tokens[:, end - 1 : end], **{CACHE: cache}).logits for end in range(PROMPT + 1, PROMPT + 4)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("inference_first", [True, False])
def test_captured_and_other_steps_take_turns(inference_first: bool) -> None:
    model, tokens = build("hybrid", num_hidden_layers=1), random_tokens(2, LENGTH)
    modes = (torch.inference_mode, torch.no_grad) if inference_first else (torch.no_grad, torch.inference_mode)
    with torch.no_grad():
        expected = model(tokens).logits
    cache = model.new_cache()
    with modes[0]():
        found = [model(tokens[:, :PROMPT], **{CACHE: cache}).logits.clone()]
    for column in range(PROMPT, LENGTH):
        model.captures_steps = column % 3 != 0
        with modes[column % 2]():
            found.append(model(tokens[:, column, None], **{CACHE: cache}).logits.clone())
        rows = cache.layers[0].mosa
        blocks = (rows.counts + BLOCK - 1) // BLOCK
        full = rows.counts % BLOCK == 0
        assert rows.host_totals() == [1 + int(blocks.sum()), int(rows.counts.max()), int(full.sum())]
        assert cache.bytes()["mosa"][1] == 2 * int(rows.counts.sum()) * model.config.head_dim * 4
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@torch.no_grad()
def test_buffers_of_all_layers_grow_together() -> None:
    model, tokens = build("followed", num_hidden_layers=2), random_tokens(1, 70)
    cache, keys = model.new_cache(), []
    model(tokens[:, :30], **{CACHE: cache})
    for column in range(30, 70):
        model(tokens[:, column, None], **{CACHE: cache})
        keys.append(graph_mosa._STEPS[cache].key)
    assert 1 <= sum(before != after for before, after in pairwise(keys)) <= 2  # dense rows, and all MoSA heads


@pytest.mark.usefixtures("interpreted")
@torch.no_grad()
def test_padding_that_begins_after_the_prompt() -> None:
    model, tokens = build("hybrid", num_hidden_layers=1), random_tokens(2, LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, PROMPT + 2 : PROMPT + 4] = 0
    expected = model(tokens, attention_mask=mask).logits
    found = decoded(model, tokens, mask, [PROMPT, *[1] * (LENGTH - PROMPT)])
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@torch.no_grad()
def test_masks_that_do_not_fit() -> None:
    model, tokens = build("dense", num_hidden_layers=1), random_tokens(2, PROMPT + 1)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    cache = model.new_cache()
    model(tokens[:, :PROMPT], attention_mask=mask[:, :PROMPT], **{CACHE: cache})
    for given, message in ((None, "attention_mask is missing"), (mask[:, 1:], r"expected \(2, 15\)")):
        with pytest.raises(ValueError, match=message):
            model(tokens[:, PROMPT:], attention_mask=given, **{CACHE: cache})


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "sizes", [(2, 4, 2, 8, 70, [53]), (1, 3, 3, 12, 40, [1]), (3, 2, 1, 16, 50, [5, 50, 33])], ids=str
)
def test_attention_to_stored_rows(sizes: tuple) -> None:
    batch, heads, groups, size, stored, given = sizes
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, size, generator=generator)
    keys, values = torch.randn(2, batch, groups, stored, size, generator=generator)
    lengths = torch.tensor(given)
    last = lengths.expand(batch)
    valid = torch.rand(batch, stored, generator=generator) > 0.5
    valid[torch.arange(batch), last - 1] = True
    for mask in (None, valid):
        visible = torch.arange(stored) < last[:, None]
        visible = visible if mask is None else visible & mask
        whole = [part.repeat_interleave(heads // groups, 1) for part in (keys, values)]
        expected = F.scaled_dot_product_attention(query[:, :, None], *whole, visible[:, None, None])[:, :, 0]
        torch.testing.assert_close(attend_to_rows(query, keys, values, lengths, mask), expected, rtol=1e-5, atol=1e-6)
