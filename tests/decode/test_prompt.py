"""Prompts read by the kernels of training, in Triton's interpreter, against plain PyTorch."""

from __future__ import annotations

from unittest import mock
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from megatron_mosa.hf.cache_mosa import MosaCache
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM
from megatron_mosa.hf.room_mosa import Prompts, Room
from megatron_mosa.hf.rows_mosa import SelectedRows
from megatron_mosa.kernels import prompt
from megatron_mosa.kernels.triton import cached
from tests.decode.models import build, random_tokens

LENGTH, PROMPT = 40, 37


@pytest.mark.parametrize(
    ("kind", "selection"),
    [("pure", "threshold"), ("followed", "threshold"), ("chosen", "threshold"), ("pure", "expert_choice")],
)
@torch.no_grad()
def test_logits_and_what_is_decoded_after_it(kind: str, selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build(kind, selection, num_hidden_layers=2), random_tokens(2, LENGTH)

    def run(backend: str) -> tuple[torch.Tensor, int]:
        monkeypatch.setenv("MOSA_BACKEND", backend)
        with mock.patch.object(prompt, "read_prompt", wraps=prompt.read_prompt) as read:
            logits = [model(tokens).logits]
            if selection == "threshold":
                cache = model.new_cache()
                for start, end in ((0, PROMPT), (PROMPT, PROMPT + 2), (PROMPT + 2, LENGTH)):
                    logits.append(model(tokens[:, start:end], **{CACHE: cache}).logits)
        return torch.cat(logits, dim=1), read.call_count

    (plain, none), (found, calls) = run("naive"), run("triton")
    assert none == 0 and calls == (4 if selection == "threshold" else 2)  # layers, without and with a cache
    assert plain.std() > 0.3
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_plain_pytorch_reads_what_the_kernels_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSA_BACKEND", "triton")
    model, tokens = build("pure", num_hidden_layers=1), random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with mock.patch.object(prompt, "read_prompt") as read:
        model(tokens).logits.sum().backward()
        with torch.no_grad():
            model(tokens, attention_mask=mask)
            monkeypatch.setenv("MOSA_BACKEND", "naive")
            model(tokens)
    assert read.call_count == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_the_cache_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "BLOCKS", 1)  # so that there are several programs
    model, tokens = build("pure", num_hidden_layers=1, head_dim=12), random_tokens(3, 90)
    caches = []
    for backend in ("naive", "triton"):
        monkeypatch.setenv("MOSA_BACKEND", backend)
        caches.append(model.new_cache())
        model(tokens, **{CACHE: caches[-1]})
    plain, found = (cache.layers[0].mosa for cache in caches)
    assert plain.counts.max() > 32 > plain.counts.min()
    assert torch.equal(plain.counts, found.counts) and plain.host_totals() == found.host_totals()
    assert torch.equal(plain.table[..., :-1], found.table[..., :-1]) and plain.bytes() == found.bytes()
    used = torch.arange(plain.read()[0].shape[2]) < plain.counts[..., None]
    for expected, given in zip(plain.read(), found.read(), strict=True):
        torch.testing.assert_close(given[used], expected[used], rtol=1e-5, atol=1e-5)


def selected(model: MosaForCausalLM, cache: MosaCache) -> list[Tensor]:
    """Return counts, totals, and the keys in use of all layers."""
    parts = []
    for layer in cache.layers:
        assert layer.mosa is not None and layer.mosa.counts is not None
        keys = layer.mosa.read()[0]
        used = torch.arange(keys.shape[2]) < layer.mosa.counts[..., None]
        parts += [layer.mosa.counts, torch.tensor(layer.mosa.host_totals()), layer.mosa.totals, keys[used]]
    return parts


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pure", "followed"])
def test_a_similar_prompt_is_read_without_waiting_in_each_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSA_BACKEND", "triton")
    model, (first, tokens) = build(kind, num_hidden_layers=2), random_tokens(4, LENGTH).split(2)
    exact = model.new_cache()
    expected = model(tokens[:, :PROMPT], **{CACHE: exact}).logits  # no earlier one is known
    for layer in model.model.layers:
        layer.self_attn.mosa_heads.prompts.shares.clear()
    model(first[:, :PROMPT])
    events: list[str] = []
    asked = SelectedRows.host_totals
    monkeypatch.setattr(SelectedRows, "host_totals", lambda rows: events.append("host") or asked(rows))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: events.append("layer"))
    model(tokens[:, :PROMPT])
    assert events == ["layer", "layer", "host", "host"]
    cache = model.new_cache()
    found = model(tokens[:, :PROMPT], **{CACHE: cache}).logits
    assert events[4:] == events[:4]
    monkeypatch.setattr(SelectedRows, "host_totals", asked)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for given, wanted in zip(selected(model, cache), selected(model, exact), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    steps = [model(tokens[:, end - 1 : end], **{CACHE: cache}).logits for end in range(PROMPT + 1, LENGTH + 1)]
    monkeypatch.setenv("MOSA_BACKEND", "naive")
    torch.testing.assert_close(torch.cat((found, *steps), dim=1), model(tokens).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("rows", "blocks"), [(2, 400), (400, 3)])
def test_a_prompt_without_enough_room_is_read_again(rows: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("hybrid", num_hidden_layers=3), random_tokens(2, 70)
    monkeypatch.setenv("MOSA_BACKEND", "naive")
    expected, plain = model(tokens).logits, model.new_cache()
    model(tokens[:, :67], **{CACHE: plain})
    monkeypatch.setenv("MOSA_BACKEND", "triton")
    model(tokens[:, :67])
    counts = [layer.mosa.counts for layer in plain.layers if layer.mosa is not None]
    short = model.model.layers[1].self_attn.mosa_heads.prompts
    monkeypatch.setattr(short, "guess", lambda *_: Room(rows, blocks))
    assert 16 < counts[1].max() < 64
    parts: WeakSet[SelectedRows] = WeakSet()  # in memory
    numbers, begin = [], SelectedRows.begin

    def count(rows: SelectedRows, *counted: Tensor) -> None:
        parts.add(rows)
        numbers.append(len(parts))
        begin(rows, *counted)

    monkeypatch.setattr(SelectedRows, "begin", count)
    with mock.patch.object(prompt, "read_prompt", wraps=prompt.read_prompt) as read:
        cache = model.new_cache()
        found = [model(tokens[:, :67], **{CACHE: cache}).logits]
        assert read.call_count == 6 and numbers == [1, 2, 3, 1, 2, 3]
        monkeypatch.undo()
    assert cache.get_seq_length() == 67
    for given, wanted in zip(selected(model, cache), selected(model, plain), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    found += [model(tokens[:, end - 1 : end], **{CACHE: cache}).logits for end in range(68, 71)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_prompt_is_read_again_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each layer may be a collective of ranks that share its weights, and no other rank would repeat it.
    model, tokens = build("pure", num_hidden_layers=1), random_tokens(1, LENGTH)
    expected = model(tokens).logits
    monkeypatch.setenv("MOSA_BACKEND", "triton")
    prompts = model.model.layers[0].self_attn.mosa_heads.prompts

    def calls(room: Room, cache: MosaCache | None) -> int:
        with mock.patch.object(prompts, "guess", lambda *_: room):
            with mock.patch.object(prompt, "read_prompt", wraps=prompt.read_prompt) as read:
                found = model(tokens, **{} if cache is None else {CACHE: cache}).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        return read.call_count

    few_blocks, few_rows = Room(LENGTH, 3), Room(2, 400)
    assert calls(few_blocks, None) == 1 and calls(few_blocks, model.new_cache()) == 2  # blocks are of the cache
    assert calls(few_rows, None) == 2
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert calls(few_rows, None) == calls(few_blocks, model.new_cache()) == 1


@torch.no_grad()
def test_prompts_that_select_more_or_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSA_BACKEND", "triton")
    model, tokens = build("pure", num_hidden_layers=1), random_tokens(4, LENGTH)
    calls, blocks = [], []
    for threshold in (0.999, 0.05, 0.05, 0.999):
        model.model.layers[0].self_attn.mosa_heads.thresholds.fill_(threshold)
        cache = model.new_cache()
        with mock.patch.object(prompt, "read_prompt", wraps=prompt.read_prompt) as read:
            found = model(tokens[:, :PROMPT], **{CACHE: cache}).logits
        calls.append(read.call_count)
        blocks.append(len(cache.layers[0].mosa.keys))
    assert calls == [1, 2, 1, 1]  # the second did not fit
    assert blocks[0] == blocks[3] < blocks[1] < blocks[2] <= 1.25 * blocks[1]
    found = torch.cat((found, model(tokens[:, PROMPT:], **{CACHE: cache}).logits), dim=1)
    monkeypatch.setenv("MOSA_BACKEND", "naive")
    torch.testing.assert_close(found, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_room_follows_earlier_prompts() -> None:
    prompts, heads, batch = Prompts(8), 8, 4
    assert prompts.guess(batch, 1000) is None

    def totals(length: int, most: int, mean: int) -> list[int]:
        return [1 + batch * heads * (mean // 16) + batch * heads // 2, most, 0]

    prompts.learn(batch, 1000, totals(1000, 100, 64))
    assert prompts.guess(batch, 1000) == Room(166, 2 + 16 + int(1.125 * 128))
    room = prompts.guess(2 * batch, 520)
    assert room is not None and room.rows == 94 and room.blocks < 2 + 32 + 1.125 * 256 * 0.53
    assert prompts.guess(batch, 400) is None and prompts.guess(batch, 1024) is None  # other lengths
    prompts.learn(1, 127, [1 + heads, 16, 0])
    assert prompts.guess(1, 66) == Room(28, 2 + heads)  # a block of each head, which holds the first token
    prompts.learn(batch, 1000, totals(1000, 20, 16))  # fewer: forgotten slowly
    assert prompts.guess(batch, 1000) == Room(151, 2 + 16 + int(1.125 * 116))
    prompts.learn(batch, 1000, totals(1000, 900, 640))  # more: at once, and never more rows than tokens
    assert prompts.guess(batch, 1000) == Room(1000, 2 + 16 + int(1.125 * 1280))
    for room, fits in ((Room(900, 1297), True), (Room(899, 1297), False), (Room(900, 1296), False)):
        assert room.holds(totals(1000, 900, 640)) is fits


def test_capacities_are_few() -> None:
    capacities = [prompt.capacity_for(largest) for largest in range(1, 4097)]
    assert all(largest <= found for largest, found in enumerate(capacities, 1))
    assert all(
        found <= max(16 * -(-largest // 16), largest * 8 / 7 + 16) for largest, found in enumerate(capacities, 1)
    )
    assert len(set(capacities)) <= 16 + 8 * 5 and all(found % 16 == 0 for found in capacities)
