"""Decoding with the kernels on a GPU matches the forward pass of the whole sequence and the plain path."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_mosa.hf import graph_mosa, sparse_mosa
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM
from megatron_mosa.hf.room_mosa import Room
from megatron_mosa.kernels import prompt
from tests.decode.models import build, random_tokens

WIDE = {"hidden_size": 192, "head_dim": 64, "num_mosa_heads": 40, "sparsity": 4, "num_hidden_layers": 2}
PROMPT, LENGTH = 300, 420  # heads select up to a hundred more tokens, in several blocks of the cache


@pytest.fixture(autouse=True)
def precise() -> Iterator[None]:
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def steps(model: MosaForCausalLM, tokens: Tensor, start: int, mask: Tensor | None, cache: object) -> Tensor:
    """Feed the tokens from ``start`` on one by one; return their logits."""
    logits = []
    for end in range(start + 1, tokens.shape[1] + 1):
        seen = None if mask is None else mask[:, :end]
        logits.append(model(tokens[:, end - 1 : end], attention_mask=seen, **{CACHE: cache}).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("changes", [{}, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("kind", ["pure", "many", "hybrid", "followed", "grouped", "local"])
def test_decoding_matches_the_forward_pass(kind: str, changes: dict[str, int], padded: bool) -> None:
    if kind in ("grouped", "local"):
        changes = {name: value for name, value in changes.items() if name != "num_mosa_heads"}
    model, tokens = build(kind, **changes).cuda(), random_tokens(3, LENGTH).cuda()
    if changes:  # as large a spread of router logits as in the narrow model
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_((24 / WIDE["hidden_size"]) ** 0.5)
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        mask[0, :130] = mask[1, 310:315] = 0
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    expected = model(tokens, attention_mask=mask).logits
    assert expected.std() > 0.1
    cache, found, start = model.new_cache(), [], 0
    for end in (120, 121, PROMPT):
        seen = None if mask is None else mask[:, :end]
        found.append(model(tokens[:, start:end], attention_mask=seen, **{CACHE: cache}).logits)
        start = end
    for captures, used in ((False, copy.deepcopy(cache)), (True, cache)):
        model.captures_steps = captures
        logits = torch.cat((*found, steps(model, tokens, PROMPT, mask, used)), dim=1)
        torch.testing.assert_close(logits[valid], expected[valid], rtol=1e-4, atol=1e-4)
        for layer in used.layers:
            if layer.mosa is not None:
                assert layer.mosa.host_totals() == layer.mosa.totals.tolist()
                assert layer.mosa.host_totals()[1] == layer.mosa.counts.max()
    assert graph_mosa._STEPS[cache].graph is not None


@torch.no_grad()
@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("kind", ["pure", "hybrid", "followed"])
def test_prompts_in_guessed_room(kind: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (first, tokens) = build(kind).cuda(), random_tokens(6, LENGTH).cuda().split(3)
    expected = model(tokens).logits  # no earlier prompt is known
    model(first[:, :PROMPT])
    if not fits:
        monkeypatch.setattr(model.model.layers[1].self_attn.mosa_heads.prompts, "guess", lambda *_: Room(8, 9))
    with mock.patch.object(prompt, "read_prompt", wraps=prompt.read_prompt) as read:
        for captures in (False, True):
            model.captures_steps, cache = captures, model.new_cache()
            found = model(tokens[:, :PROMPT], **{CACHE: cache}).logits
            logits = torch.cat((found, steps(model, tokens, PROMPT, None, cache)), dim=1)
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert read.call_count == 2 * len(model.model.layers) * (1 if fits else 2)


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("kind", ["pure", "grouped", "hybrid"])
def test_steps_are_captured_on_another_device_than_the_current_one(kind: str) -> None:
    model, tokens = build(kind).to("cuda:1"), random_tokens(3, 30).to("cuda:1")
    cache, expected = model.new_cache(), model(tokens).logits
    model(tokens[:, :20], **{CACHE: cache})
    torch.testing.assert_close(steps(model, tokens, 20, None, cache), expected[:, 20:], rtol=1e-4, atol=1e-4)
    assert graph_mosa._STEPS[cache].graph is not None


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_match_the_plain_path(dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("pure", hidden_size=320, head_dim=head_dim, num_mosa_heads=70, num_hidden_layers=1)
    for parameter in model.parameters():
        parameter.mul_(0.3)
    model = model.cuda().to(dtype)
    model.captures_steps = False  # it would call no hooks
    tokens = random_tokens(5, LENGTH).cuda()
    cache = model.new_cache()
    model(tokens[:, :PROMPT], **{CACHE: cache})
    caches = [cache, copy.deepcopy(cache)]
    outputs: list[list[Tensor]] = [[], []]
    number = 0
    model.model.layers[0].self_attn.mosa_heads.register_forward_hook(lambda *call: outputs[number].append(call[2]))
    steps(model, tokens, PROMPT, None, caches[0])
    number = 1
    monkeypatch.setattr(sparse_mosa, "can_run_kernels", lambda states: False)
    steps(model, tokens, PROMPT, None, caches[1])
    rounding = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    for found, plain in zip(*outputs, strict=True):
        assert (found.float() - plain.float()).norm() <= rounding * plain.float().norm()
    first, second = (given.layers[0].mosa for given in caches)
    assert torch.equal(first.counts, second.counts) and first.host_totals() == second.host_totals()
    assert first.table[:, :, :-1].unique().numel() == first.host_totals()[0]  # no block has two owners
