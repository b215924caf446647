"""Prompts read by the kernels of training, in Triton's interpreter, against plain PyTorch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron_mosa.hf.modeling_mosa import CACHE
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


def test_capacities_are_few() -> None:
    capacities = [prompt.capacity_for(largest) for largest in range(1, 4097)]
    assert all(largest <= found for largest, found in enumerate(capacities, 1))
    assert all(
        found <= max(16 * -(-largest // 16), largest * 8 / 7 + 16) for largest, found in enumerate(capacities, 1)
    )
    assert len(set(capacities)) <= 16 + 8 * 5 and all(found % 16 == 0 for found in capacities)
