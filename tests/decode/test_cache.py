"""Decoding with a cache equals the forward pass on the whole sequence, and the cache reports its true size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_mosa.hf.cache_mosa import MosaCache
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM
from megatron_mosa.hf.rows_mosa import MIN_GROWTH
from megatron_mosa.hf.sparse_mosa import MosaHeads
from tests.decode.models import KINDS, build, random_tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # logits reach 5, and rounding differs between processors
LENGTH = 41
CUTS = {
    "token by token": [1] * LENGTH,
    "prompt, then token by token": [20] + [1] * 21,
    "pieces": [3, 17, 1, 1, 9, 10],
    "at once": [LENGTH],
}


def fed(
    model: MosaForCausalLM, tokens: Tensor, cuts: list[int], mask: Tensor | None = None
) -> tuple[Tensor, MosaCache]:
    """Feed tokens piece by piece; return their logits [B, T, V] and the final cache."""
    cache, start, logits = model.new_cache(), 0, []
    for count in cuts:
        seen = None if mask is None else mask[:, : start + count]
        logits.append(model(tokens[:, start : start + count], attention_mask=seen, **{CACHE: cache}).logits)
        start += count
    assert start == tokens.shape[1] == cache.get_seq_length()
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_cache_changes_nothing(kind: str, cuts: str) -> None:
    model, tokens = build(kind), random_tokens(3, LENGTH)
    expected = model(tokens).logits
    assert expected.std() > 0.3  # not a comparison of flat distributions
    found, _ = fed(model, tokens, CUTS[cuts])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_changes_nothing(kind: str, side: str, cuts: str) -> None:
    model, tokens = build(kind), random_tokens(4, LENGTH)
    mask = torch.zeros_like(tokens)
    parts = []
    for number, count in enumerate((LENGTH, 1, 22, 30)):
        parts.append(slice(LENGTH - count, LENGTH) if side == "left" else slice(0, count))
        mask[number, parts[-1]] = 1
    whole = model(tokens, attention_mask=mask).logits
    cached, _ = fed(model, tokens, CUTS[cuts], mask)
    for number, part in enumerate(parts):
        alone = model(tokens[number : number + 1, part]).logits[0]
        torch.testing.assert_close(whole[number, part], alone, **CLOSE)
        torch.testing.assert_close(cached[number, part], alone, **CLOSE)
    assert cached.isfinite().all() and whole.isfinite().all()


@torch.no_grad()
def test_a_mask_with_holes_ignores_tokens() -> None:
    model, tokens = build("hybrid"), random_tokens(2, LENGTH)
    mask = torch.ones_like(tokens)
    mask[0, [0, 4, 5, 6, 30]] = 0
    alone = model(tokens[:1, mask[0] == 1]).logits[0]
    torch.testing.assert_close(fed(model, tokens, CUTS["pieces"], mask)[0][0, mask[0] == 1], alone, **CLOSE)
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits[0, mask[0] == 1], alone, **CLOSE)


@torch.no_grad()
def test_attention_in_chunks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long windows and masks are processed one chunk of queries at a time."""
    model, tokens = build("hybrid"), random_tokens(2, LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    expected = model(tokens, attention_mask=mask).logits
    monkeypatch.setattr("megatron_mosa.hf.dense_mosa.QUERY_CHUNK", 4)
    for found in (model(tokens, attention_mask=mask).logits, fed(model, tokens, [30, 11], mask)[0]):
        torch.testing.assert_close(found[mask == 1], expected[mask == 1], **CLOSE)


def selected_by_hand(model: MosaForCausalLM, tokens: Tensor) -> list[int]:
    """Count the tokens that the heads of each layer select, from the layer's input."""
    states = model(tokens, output_hidden_states=True).hidden_states
    counts = []
    for layer, before in zip(model.model.layers, states, strict=False):
        heads = layer.self_attn.mosa_heads
        scores = torch.sigmoid(layer.input_layernorm(before) @ heads.router_weight.T)  # [B, T, E]
        scores[:, 0] = 2
        counts.append(int((scores > heads.thresholds).sum()))
    return counts


@torch.no_grad()
def test_the_cache_holds_only_selected_tokens() -> None:
    model, tokens = build("hybrid", num_mosa_heads=9), random_tokens(2, 400)
    _, cache = fed(model, tokens, [300, *[1] * 100])
    pair = 2 * 8 * 4  # a key and a value of 8 fp32 elements
    found = cache.bytes()
    counts = selected_by_hand(model, tokens)
    assert found["mosa"][1] == sum(counts) * pair
    assert found["dense"][1] == 3 * 2 * 2 * 400 * pair  # layers, sequences, groups of queries
    assert found["local"][1] == 3 * 2 * 2 * 6 * pair
    _, fixed = fed(build("fixed"), tokens, [300, *[1] * 100])
    allocated, used = fixed.bytes()["fixed"]
    assert used == 3 * 2 * 3 * 100 * pair and allocated < 1.3 * used  # every fourth token
    for layer, count in zip(cache.layers, counts, strict=True):
        rows = layer.mosa
        assert int(rows.counts.sum()) == count and rows.counts.max() > 2 * rows.counts.min()  # ragged
        blocks = int(((rows.counts + 15) // 16).sum())
        assert rows.host_totals() == [blocks + 1, int(rows.counts.max()), int((rows.counts % 16 == 0).sum())]
        assert blocks + 1 <= len(rows.keys) <= 1.2 * blocks + 20
        assert rows.table[:, :, :-1].unique().numel() == blocks + 1  # no block has two owners
    # slightly more is allocated than selected, however unequal the heads are
    assert found["mosa"][0] < 1.3 * found["mosa"][1]
    assert found["dense"][0] < 1.1 * found["dense"][1]
    cache.reset()
    assert cache.bytes() == dict.fromkeys(found, (0, 0)) and cache.get_seq_length() == 0
    torch.testing.assert_close(model(tokens[:1, :9], **{CACHE: cache}).logits, model(tokens[:1, :9]).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["hybrid", "many", "all"])
@torch.no_grad()
def test_sequences_of_a_batch_are_reordered(kind: str) -> None:
    model, tokens = build(kind), random_tokens(3, LENGTH)
    mask = torch.ones_like(tokens)
    mask[1, :15] = mask[2, :36] = 0
    order = torch.tensor([2, 0, 0])
    expected = model(tokens[order], attention_mask=mask[order]).logits[:, -3:]
    start = LENGTH - 3
    _, cache = fed(model, tokens[:, :start], [30, *[1] * 8], mask)
    cache.reorder_cache(order)
    for column in range(start, LENGTH):
        seen, token = mask[order, : column + 1], tokens[order, column : column + 1]
        found = model(token, attention_mask=seen, **{CACHE: cache}).logits[:, 0]
        torch.testing.assert_close(found, expected[:, column - start], **CLOSE)
    _, cache = fed(model, tokens[:, :start], [start], mask)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 1]))
    found = model(tokens[order, start:], attention_mask=mask[order], **{CACHE: cache}).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("reorders", [False, True])
@torch.no_grad()
def test_blocks_of_all_heads_can_fill_up_at_once(reorders: bool) -> None:
    """More new blocks are needed at once than the pool has to spare."""
    model, tokens = build("pure"), random_tokens(4, 35)
    for name, buffer in model.named_buffers():
        if name.endswith("thresholds"):
            buffer.zero_()  # every head selects every token
    expected = model(tokens).logits
    _, cache = fed(model, tokens[:, :32], [32])
    assert all(layer.mosa.host_totals()[2] == 4 * 6 > MIN_GROWTH for layer in cache.layers)
    order = torch.tensor([2, 0, 3, 1]) if reorders else torch.arange(4)
    if reorders:
        cache.reorder_cache(order)
    for column in range(32, 35):
        found = model(tokens[order, column : column + 1], **{CACHE: cache}).logits[:, 0]
        torch.testing.assert_close(found, expected[order, column], **CLOSE)


@pytest.mark.parametrize("all_weights", [True, False])
@torch.no_grad()
def test_a_step_reads_weights_of_all_heads_or_only_of_selecting_ones(
    monkeypatch: pytest.MonkeyPatch, all_weights: bool
) -> None:
    model, tokens = build("hybrid"), random_tokens(3, LENGTH)
    heads = model.model.layers[0].self_attn.mosa_heads
    assert heads.reads_all_weights(2) and not heads.reads_all_weights(1)
    monkeypatch.setattr(MosaHeads, "reads_all_weights", lambda *_: all_weights)
    torch.testing.assert_close(fed(model, tokens, CUTS["token by token"])[0], model(tokens).logits, **CLOSE)


@torch.no_grad()
def test_a_window_has_the_configured_length() -> None:
    model, tokens = build("local", num_hidden_layers=1), random_tokens(1, 20)
    other = tokens.clone()
    other[0, 7] += 1
    difference = (fed(model, tokens, [9, *[1] * 11])[0] - fed(model, other, [9, *[1] * 11])[0]).abs().amax(dim=(0, 2))
    assert (difference > 1e-3).nonzero().flatten().tolist() == [7, 8, 9, 10, 11]


@torch.no_grad()
def test_a_mismatched_cache_is_refused() -> None:
    model, tokens = build("hybrid"), random_tokens(2, 8)
    cache = model(tokens, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match=r"belongs to another model: it has num_mosa_heads=6, this model 9"):
        build("hybrid", num_mosa_heads=9)(tokens, **{CACHE: cache})
    with pytest.raises(ValueError, match=r"has 2 sequences, but the input 1; expected the same number"):
        model(tokens[:1], **{CACHE: cache})
    with pytest.raises(ValueError, match=r"is a dict; expected the result of model.new_cache\(\)"):
        model(tokens, **{CACHE: {}})
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 8\); expected \(2, 16\)"):
        model(tokens, attention_mask=torch.ones_like(tokens), **{CACHE: cache})
    with pytest.raises(ValueError, match=r"cannot be cropped"):
        cache.crop(-1)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"a cache stores no gradients; call the model under"):
        model(tokens, use_cache=True)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    cache = model(tokens, attention_mask=mask, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match=r"attention_mask is missing, and the cache began with one; expected \(2, 9\)"):
        model(tokens[:, :1], **{CACHE: cache})
