"""Selection by thresholds against a loop over tokens, and independence of future tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import MosaForCausalLM
from megatron_mosa.hf.sparse_mosa import MosaHeads
from megatron_mosa.hf.tokens_mosa import Tokens, rotary_tables
from tests.decode.models import KINDS, build, random_tokens


def by_hand(heads: MosaHeads, states: Tensor) -> Tensor:
    """Compute the heads' output [T, h] for states [T, h] in float64, head by head and token by token."""
    config = heads.config
    output = torch.zeros_like(states, dtype=torch.float64)
    size = config.head_dim
    rotated = int(size * config.rotary_percent)
    for number in range(config.num_mosa_heads):
        weight = heads.qkv_weight[number].double()
        kept: list[tuple[Tensor, Tensor]] = []
        for position, state in enumerate(states.double()):
            score = torch.sigmoid(state @ heads.router_weight[number].double())
            excess = len(kept) - position / config.sparsity
            threshold = torch.logit(heads.thresholds[number].double()) + config.load_feedback * excess
            if position > 0 and not torch.logit(score) > threshold:
                continue
            query, key, value = (state @ weight[:, size * part : size * (part + 1)] for part in range(3))
            for vector in (query, key):
                for pair in range(rotated // 2):
                    angle = torch.tensor(position * config.rotary_base ** (-2 * pair / rotated), dtype=torch.float64)
                    first, second = vector[pair].clone(), vector[pair + rotated // 2].clone()
                    vector[pair] = first * angle.cos() - second * angle.sin()
                    vector[pair + rotated // 2] = first * angle.sin() + second * angle.cos()
            kept.append((key, value))
            weights = torch.stack([query @ key for key, _ in kept]).div(size**0.5).softmax(0)
            attended = sum(share * value for share, (_, value) in zip(weights, kept, strict=True))
            output[position] += score * (attended @ heads.proj_weight[number].double())
    return output


@torch.no_grad()
@pytest.mark.parametrize("feedback", [0.0, 0.5, 9.0])
def test_threshold_heads_against_a_loop(feedback: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mosa.hf.sparse_mosa.SELECTION_CHUNK", 5)
    model = build("pure", rotary_percent=0.5, load_feedback=feedback)
    heads = model.model.layers[1].self_attn.mosa_heads
    states = torch.randn(2, 19, 24, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(19)[None]
    found = heads(states, Tokens(positions, rotary_tables(positions, model.config)), None)
    for sequence in range(2):
        torch.testing.assert_close(found[sequence].double(), by_hand(heads, states[sequence]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_score_at_the_threshold_is_not_above_it() -> None:
    heads = build("pure").model.layers[0].self_attn.mosa_heads
    heads.thresholds.fill_(0.5)
    scores = torch.tensor([0.1, 0.5, 0.50001, 0.4, 0.9]).expand(2, 6, 5)
    positions = torch.arange(5)[None]
    tokens = Tokens(positions, rotary_tables(positions, heads.config))
    assert torch.equal(heads.select(scores, tokens, None), torch.tensor([0, 2, 4]).expand(2, 6, 3))


@pytest.mark.parametrize("selection", ["threshold", "expert_choice"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_causality(kind: str, selection: str) -> None:
    """Changing tokens after t does not change outputs up to t, except with expert choice."""
    model, tokens = build(kind, selection), random_tokens(4, 40)
    other = tokens.clone()
    other[:, 24:] = random_tokens(4, 16, seed=9)
    difference = (model(tokens).logits - model(other).logits).abs().amax(dim=(0, 2))  # [T]
    assert difference[24:].min() > 0.1
    if KINDS[kind].get("num_mosa_heads") and selection == "expert_choice":
        assert difference[:24].max() > 0.1
        shorter = model(tokens[:, :24]).logits
        assert (model(tokens).logits[:, :24] - shorter).abs().max() > 0.1
    else:
        assert difference[:24].max() < 1e-5
        torch.testing.assert_close(model(tokens[:, :24]).logits, model(tokens).logits[:, :24], rtol=0, atol=1e-5)


def test_thresholds_stay_in_fp32(tmp_path: Path) -> None:
    model = build("hybrid")
    exact = model.model.layers[2].self_attn.mosa_heads.thresholds.clone()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.layers.2.self_attn.mosa_heads.thresholds"]
    assert torch.equal(stored, exact) and stored.dtype == torch.float32 and not torch.equal(exact.bfloat16(), exact)
    for read in (
        MosaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        MosaForCausalLM.from_pretrained(tmp_path).bfloat16(),
        model.to(torch.float16),
    ):
        heads = read.model.layers[2].self_attn.mosa_heads
        assert heads.qkv_weight.dtype != torch.float32
        assert heads.thresholds.dtype == torch.float32 and torch.equal(heads.thresholds, exact)
    assert heads.thresholds.untyped_storage().nbytes() == 24


def test_unknown_selections_are_refused() -> None:
    with pytest.raises(ValueError, match=r"selection must be expert_choice or threshold or token_choice, got 'top_k'"):
        MosaConfig(num_mosa_heads=2, selection="top_k")
    assert MosaConfig(num_mosa_heads=2).selection == "expert_choice"
    keys = MosaForCausalLM(MosaConfig(num_mosa_heads=2, num_hidden_layers=1, vocab_size=8)).state_dict()
    assert not any("thresholds" in key for key in keys)


def test_unset_thresholds_are_refused(tmp_path: Path) -> None:
    model = build("hybrid")
    model.model.layers[1].self_attn.mosa_heads.thresholds[3] = torch.nan
    message = r"^mosa_heads.thresholds of layers 1 are NaN: they are not calibrated"
    tokens = random_tokens(1, 4)
    with pytest.raises(ValueError, match=message):
        model(tokens)
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, max_new_tokens=2)
    fresh = MosaForCausalLM(model.config)
    assert fresh.model.layers[0].self_attn.mosa_heads.thresholds.isnan().all()


def test_threshold_models_can_be_trained_further(tmp_path: Path) -> None:
    model, tokens = build("hybrid"), random_tokens(2, 30)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
