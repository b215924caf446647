"""Routing heads in exported models: padding, types, and decoding, which they do not support."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import MosaForCausalLM
from tests.decode.models import LOOKING_AHEAD, build, random_tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", LOOKING_AHEAD)
@torch.no_grad()
def test_padding_changes_nothing(kind: str, side: str) -> None:
    model, tokens = build(kind, "expert_choice"), random_tokens(4, 20)
    lengths = [20, 11, 2, 1]
    mask = torch.zeros_like(tokens)
    for row, length in zip(mask, lengths, strict=True):
        row[slice(20 - length, None) if side == "left" else slice(length)] = 1
    padded = model(tokens, attention_mask=mask).logits
    for number, kept in enumerate(mask.bool()):
        alone = model(tokens[number : number + 1, kept]).logits[0]
        torch.testing.assert_close(padded[number, kept], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", LOOKING_AHEAD)
@torch.no_grad()
def test_outputs_depend_on_later_tokens(kind: str) -> None:
    model, tokens = build(kind), random_tokens(4, 40)  # MoSA heads with thresholds, which are causal
    other = tokens.clone()
    other[:, 24:] = random_tokens(4, 16, seed=9)
    difference = (model(tokens).logits - model(other).logits).abs().amax(dim=(0, 2))  # [T]
    assert difference[24:].min() > 0.1 and difference[:24].max() > 0.1


@torch.no_grad()
def test_decoding_is_refused_unless_an_approximation_is_requested() -> None:
    model, tokens = build("routing"), random_tokens(1, 9)
    assert not model.config.can_decode and not model.config.use_cache
    with pytest.raises(ValueError, match=r"^cannot generate: num_routing_heads=4 select from the whole sequence"):
        model.generate(tokens, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"^use_cache must be False for num_routing_heads=4: every token changes"):
        model.new_cache()
    message = r"^use_cache must be False for num_routing_heads=2 and num_mosa_heads=6 with selection='expert_choice': "
    with pytest.raises(ValueError, match=message):
        build("routing_hybrid", "expert_choice")(tokens, use_cache=True)
    found = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, causal_approximation="prefix")
    for _ in range(4):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, tokens)


def test_centroids_stay_in_fp32(tmp_path: Path) -> None:
    model = build("routing")
    exact = model.model.layers[2].self_attn.routing_heads.centroids.clone()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.layers.2.self_attn.routing_heads.centroids"]
    assert torch.equal(stored, exact) and stored.dtype == torch.float32 and not torch.equal(exact.bfloat16(), exact)
    for read in (
        MosaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        MosaForCausalLM.from_pretrained(tmp_path).bfloat16(),
        model.to(torch.float16),
    ):
        heads = read.model.layers[2].self_attn.routing_heads
        assert heads.qv_weight.dtype != torch.float32
        assert heads.centroids.dtype == torch.float32 and torch.equal(heads.centroids, exact)
        assert read(random_tokens(1, 12)).logits.isfinite().all()


def test_new_models_have_centroids_of_unit_length() -> None:
    model = MosaForCausalLM(MosaConfig(num_routing_heads=3, routing_clusters=4, num_hidden_layers=1, vocab_size=8))
    heads = model.model.layers[0].self_attn.routing_heads
    torch.testing.assert_close(heads.centroids.norm(dim=-1), torch.ones(3, 4))
    assert heads.qv_weight.std().item() == pytest.approx(0.02, rel=0.1)
    tokens = torch.randint(8, (2, 16))
    model(tokens, labels=tokens).loss.backward()
    assert heads.qv_weight.grad is not None and heads.qv_weight.grad.norm() > 0
    with pytest.raises(ValueError, match="routing_clusters must be at least 2 with Routing heads, got 1"):
        MosaConfig(num_routing_heads=3, routing_clusters=1)
