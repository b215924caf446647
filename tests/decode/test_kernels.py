"""The kernels of a decoding step in Triton's interpreter match the plain path; for GPUs: tests/gpu/test_decode.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from megatron_mosa.hf import kernels_mosa
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM
from tests.decode.models import build, random_tokens

PROMPT, LENGTH = 60, 66  # heads fill a block of the cache and start another
CHANGES = {
    "pure": {"rotary_percent": 0.5},
    "followed": {"load_feedback": 0.5, "head_dim": 12},
    "hybrid": {"rotary_percent": 1.0},
    "many": {"hidden_size": 40, "num_mosa_heads": 9},
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_mosa, "INTERPRETED", True)
    monkeypatch.setattr(kernels_mosa, "ROWS", 16)  # so that there are several tiles
    monkeypatch.setattr(kernels_mosa, "WIDTH_BLOCK", 32)
    monkeypatch.setattr(kernels_mosa, "ROUTER_BLOCK", 16)
    monkeypatch.setattr(kernels_mosa, "MOST_SLOTS", 2)  # so that programs do the work of several heads


def decoded(model: MosaForCausalLM, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Decode the tokens after the prompt one by one; return their logits [B, LENGTH - PROMPT, V]."""
    cache, logits = model.new_cache(), []
    for start, end in ((0, PROMPT), *((column, column + 1) for column in range(PROMPT, LENGTH))):
        seen = None if mask is None else mask[:, :end]
        logits.append(model(tokens[:, start:end], attention_mask=seen, **{CACHE: cache}).logits)
    return torch.cat(logits[1:], dim=1)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", CHANGES)
@torch.no_grad()
def test_decoding_matches_the_forward_pass(kind: str, padded: bool) -> None:
    model, tokens = build(kind, num_hidden_layers=1, **CHANGES[kind]), random_tokens(2, LENGTH)
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        mask[0, :7] = 0
        mask[1, 61:63] = 0  # in the middle of the decoded tokens
    expected = model(tokens, attention_mask=mask).logits[:, PROMPT:]
    assert expected.std() > 0.3
    found = decoded(model, tokens, mask)
    valid = torch.ones_like(tokens[:, PROMPT:], dtype=torch.bool) if mask is None else mask[:, PROMPT:].bool()
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_step_matches_the_plain_path(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("pure", num_hidden_layers=1, num_mosa_heads=5).to(dtype)
    model.captures_steps = False  # it would call no hooks
    heads = model.model.layers[0].self_attn.mosa_heads
    tokens = random_tokens(2, PROMPT)
    cache = model.new_cache()
    model(tokens[:, :52], **{CACHE: cache})
    caches = [cache, copy.deepcopy(cache)]
    outputs: list[list[Tensor]] = [[], []]
    heads.register_forward_hook(lambda *call: outputs[number].append(call[2]))
    for number, interpreted in enumerate((False, True)):
        monkeypatch.setattr(kernels_mosa, "INTERPRETED", interpreted)
        for column in range(52, PROMPT):
            model(tokens[:, column : column + 1], **{CACHE: caches[number]})
    rounding = 1e-5 if dtype == torch.float32 else 0.03  # includes q and k, so also the attention logits
    for plain, found in zip(*outputs, strict=True):
        assert (found - plain).norm() <= rounding * plain.norm()
    first, second = (given.layers[0].mosa for given in caches)
    assert torch.equal(first.counts, second.counts) and first.host_totals() == second.host_totals()
    assert first.counts.max() > 16 > first.counts.min()
    used = torch.arange(first.read()[0].shape[2]) < first.counts[..., None]
    for plain, found in zip(first.read(), second.read(), strict=True):  # blocks may be numbered differently
        assert (found[used] - plain[used]).norm() <= rounding * plain[used].norm()
    assert second.table[:, :, :-1].unique().numel() == second.host_totals()[0]  # no block has two owners


def test_conditions_for_running_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kernels_mosa.can_run_kernels(torch.empty(1))  # the plain path
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CC", raising=False)
    for capability, compiler, runs in (((9, 0), "/gcc", True), ((7, 5), "/gcc", False), ((9, 0), None, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, answer=capability: answer)
        monkeypatch.setattr("shutil.which", lambda _, answer=compiler: answer)
        assert kernels_mosa.supports_kernels.__wrapped__(device) == runs


@torch.no_grad()
def test_without_triton_decoding_uses_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_mosa, "triton", None)
    monkeypatch.setattr(kernels_mosa, "INTERPRETED", True)
    model, tokens = build("hybrid", num_hidden_layers=1), random_tokens(2, LENGTH)
    torch.testing.assert_close(decoded(model, tokens, None), model(tokens).logits[:, PROMPT:], rtol=1e-5, atol=1e-5)
