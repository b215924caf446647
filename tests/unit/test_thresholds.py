"""Thresholds of MoSA heads: how they follow the scores, when they select, and that a model that has them is causal."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from megatron_mosa.attention import get_mosa_block_spec
from megatron_mosa.attention.thresholds import (
    forget_scores,
    is_causal,
    mosa_layers,
    selection_buffers,
    update_thresholds,
)
from megatron_mosa.kernels import Documents
from megatron_mosa.kernels.naive import count_scores
from megatron_mosa.metrics import recorded_selection, selection_statistics
from megatron_mosa.parallel import Layout
from tests.unit.test_spec import build_gpt, make_config


def build(seed: int = 0, **changes: object) -> GPTModel:
    torch.manual_seed(seed)
    given = dict(mosa_selection="threshold", mosa_threshold_warmup_steps=3, mosa_load_feedback=0.0)
    config = make_config(**given | changes)
    return build_gpt(config, get_mosa_block_spec(config))


def run(model: GPTModel, tokens: torch.Tensor, documents: Documents | None = None) -> torch.Tensor:
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), documents)


def random_tokens(seed: int, batch: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def calibrate(model: GPTModel, steps: int = 4) -> None:
    """Updates without an optimizer."""
    model.train()
    for seed in range(steps):
        run(model, random_tokens(seed))
        update_thresholds(model, None)


def test_thresholds_are_the_average_of_the_first_quantiles_and_then_a_moving_one(layout: Layout) -> None:
    model = build(mosa_threshold_ema=0.25)
    layer = mosa_layers(model)[0]
    expected, quantiles = torch.zeros(6, dtype=torch.float64), []
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        scores = (torch.randn(8, 6, 400, generator=generator) + 0.05 * step).sigmoid()
        for heads in mosa_layers(model):
            count_scores(scores, heads.histogram)
        quantiles.append(scores.double().transpose(0, 1).flatten(1).quantile(1 - 1 / 4.0, dim=1))
        expected = torch.stack(quantiles).mean(0) if step < 4 else expected + 0.25 * (quantiles[-1] - expected)
        update_thresholds(model, None)
        torch.testing.assert_close(layer.thresholds.double(), expected, rtol=0, atol=1e-3)
        assert (layer.threshold_updates == step + 1).all()
        assert not layer.histogram.any()


def test_a_head_whose_load_is_far_off_gets_its_quantile_at_once(layout: Layout) -> None:
    model = build()
    layer = mosa_layers(model)[0]

    def update(shift: torch.Tensor) -> torch.Tensor:
        logits = torch.randn(8, 6, 400, generator=torch.Generator().manual_seed(0)) + shift[:, None]
        for heads in mosa_layers(model):
            count_scores(logits.sigmoid(), heads.histogram)
        update_thresholds(model, None)
        return logits.sigmoid()

    for _ in range(20):
        scores = update(torch.zeros(6))
    old = layer.thresholds.clone()
    scores = update(torch.tensor([0.0, 0.1, -0.1, -3.0, 3.0, 0.5]))
    share = (scores > old[:, None]).float().mean(dim=(0, 2)) * 4.0
    assert layer.load is not None
    torch.testing.assert_close(layer.load, share, rtol=0.02, atol=0.01)
    assert layer.load[3] < 0.5 and layer.load[4] > 2 and (layer.load[[0, 1, 2, 5]] - 1).abs().max() < 0.7
    quantile = scores.transpose(0, 1).flatten(1).quantile(0.75, dim=1)
    average = old + 0.1 * (quantile - old)
    torch.testing.assert_close(layer.thresholds[3:5], quantile[3:5], rtol=0, atol=2e-3)
    torch.testing.assert_close(layer.thresholds[[0, 1, 2, 5]], average[[0, 1, 2, 5]], rtol=0, atol=2e-3)
    assert (average - quantile)[3:5].abs().min() > 0.1  # the two would not be taken for one another


def test_training_selects_by_threshold_after_the_warm_up_and_evaluation_after_one_update(layout: Layout) -> None:
    model, tokens = build(), random_tokens(0)
    kinds = []
    for _ in range(5):
        with recorded_selection(model):
            run(model.eval(), tokens)
            of_evaluation = mosa_layers(model)[0].selection
            run(model.train(), tokens)
            of_training = mosa_layers(model)[0].selection
        assert of_evaluation is not None and of_training is not None
        counts = [(indices < 32).sum(-1) for _, indices in (of_evaluation, of_training)]
        kinds.append([bool((count == 8).all()) for count in counts])  # k: expert choice
        assert is_causal(model) == (len(kinds) > 1)
        update_thresholds(model, None)
    assert kinds == [[True, True], [False, True], [False, True], [False, False], [False, False]]


@pytest.mark.parametrize("steps", [0, 2])
def test_an_update_without_scores_changes_no_threshold(layout: Layout, steps: int) -> None:
    model = build()
    calibrate(model, steps)
    before = [heads.thresholds.clone() for heads in mosa_layers(model)]
    update_thresholds(model, None)
    assert all(map(torch.equal, before, [heads.thresholds for heads in mosa_layers(model)]))
    assert is_causal(model.eval()) == (steps > 0)


def test_thresholds_in_a_compiled_model_and_in_inference_mode(layout: Layout) -> None:
    model, tokens = build(), random_tokens(0)
    calibrate(model)
    expected = run(model.eval(), tokens)
    assert torch.equal(run(cast(GPTModel, torch.compile(model, backend="eager")), tokens), expected)
    with torch.inference_mode():
        copied = build()
        copied.load_state_dict(model.state_dict())
        assert torch.equal(run(copied.eval(), tokens), expected)


def test_capacity_holds_in_training_alone(layout: Layout) -> None:
    model, tokens = build(mosa_capacity_factor=1.25), random_tokens(0)
    calibrate(model)
    for heads in mosa_layers(model):
        heads.thresholds.fill_(0.2)  # most tokens are above
    with recorded_selection(model):
        run(model.train(), tokens)
        selected = [heads.selection for heads in mosa_layers(model)]
        update_thresholds(model, None)
        found = selection_statistics(model)
        run(model.eval(), tokens)
    for number, (pair, heads) in enumerate(zip(selected, mosa_layers(model), strict=True)):
        assert pair is not None and heads.selection is not None
        scores, indices = pair
        above = scores > 0.2
        above[..., 0] = True
        assert indices.shape[-1] == 10  # ceil(1.25 * 8)
        for b in range(4):
            for e in range(6):
                taken = above[b, e].nonzero().flatten().tolist()
                assert [t for t in indices[b, e].tolist() if t < 32] == taken[:10]
        dropped = (above.sum(-1) - 10).clamp(min=0).sum()
        assert found["overflow_share"][number] == pytest.approx((dropped / above.sum()).item(), rel=1e-6)
        assert found["selection_load"][number] == pytest.approx((scores > 0.2).float().mean().item() * 4, abs=0.02)
        loads = (scores > 0.2).float().mean((0, 2)) * 4
        assert found["load_of_heads"][number] == pytest.approx(loads.tolist(), abs=0.03)
        extremes = found["selection_load_min"][number], found["selection_load_max"][number]
        assert extremes == pytest.approx((loads.min().item(), loads.max().item()), abs=0.03)
        of_heads = (above.sum(-1) - 10).clamp(min=0).sum(0) / above.sum((0, 2))
        assert found["overflow_of_heads"][number] == pytest.approx(of_heads.tolist(), rel=1e-6)
        assert found["overflow_share_max"][number] == pytest.approx(of_heads.max().item(), rel=1e-6)
        assert found["overloaded_heads"][number] == 6 and found["dead_heads"][number] == 0
        assert heads.selection[1].shape[-1] > 10


@torch.no_grad()
def test_load_feedback_selects_alike_in_training_and_evaluation(layout: Layout) -> None:
    model, tokens = build(mosa_load_feedback=0.4, mosa_capacity_factor=1.25), random_tokens(0)
    calibrate(model)
    first = mosa_layers(model)[0]
    first.thresholds.fill_(0.45)  # most scores are above
    for capacity in (10, 32):  # of training; there is none in evaluation
        with recorded_selection(model):
            run(model.train(capacity == 10), tokens)
            assert first.selection is not None
            scores, indices = first.selection
        taken_of_all = 0
        for b in range(4):
            for e in range(6):
                taken: list[int] = []
                for t, score in enumerate(scores[b, e].double().tolist()):
                    moved = math.log(0.45 / 0.55) + 0.4 * (len(taken) - t / 4)
                    if t == 0 or math.log(score / (1 - score)) > moved:
                        taken.append(t)
                assert [t for t in indices[b, e].tolist() if t < 32] == taken[:capacity]
                taken_of_all += len(taken)
        assert first.dropped is not None and first.dropped.sum() + (indices < 32).sum() == taken_of_all
    assert indices.shape[-1] < 20  # where a threshold that stands still takes most of 32
    assert int((scores > 0.45).sum(-1).max()) > 20


def test_evaluation_and_skipped_steps_count_nothing(layout: Layout) -> None:
    model = build()
    run(model.eval(), random_tokens(0))
    assert not any(heads.histogram.any() for heads in mosa_layers(model))
    run(model.train(), random_tokens(0))
    assert all((heads.histogram.sum(-1) == 4 * 32).all() for heads in mosa_layers(model))
    forget_scores(model)
    assert not any(heads.histogram.any() for heads in mosa_layers(model))


def test_statistics_of_expert_choice_are_what_they_were(layout: Layout) -> None:
    model = build(mosa_selection="expert_choice")
    with recorded_selection(model):
        run(model, random_tokens(0))
    update_thresholds(model, None)
    assert set(selection_statistics(model)) == {"selected_score_mean", "unselected_share"}
    assert not selection_buffers(model) and not is_causal(model)


@pytest.mark.parametrize("kind", ["dense", "local", "mosa", "all", "documents"])
@pytest.mark.parametrize("feedback", [0.0, 0.3])
@torch.no_grad()
def test_nothing_after_a_token_matters_to_it(layout: Layout, kind: str, feedback: float) -> None:
    counts: dict = {
        "dense": dict(num_attention_heads=2),
        "local": dict(num_local_heads=2),
        "mosa": dict(num_mosa_heads=6),
    }
    heads: dict = {"num_attention_heads": 0, "num_local_heads": 0, "num_mosa_heads": 0, "mosa_local_window": 3}
    for name in counts if kind in ("all", "documents") else [kind]:
        heads |= counts[name]
    within = {"mosa_attend_within_documents": kind == "documents"}
    starts = torch.tensor([[0] * 7 + [7] * 25] * 2)
    documents = Documents.from_starts(starts) if kind == "documents" else None
    tokens = random_tokens(1, 2)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1 + random_tokens(2, 2, 12) % 62) % 64

    def largest_change(model: GPTModel) -> float:
        before, after = run(model.eval(), tokens, documents), run(model, changed, documents)
        assert (before - after)[:, 20:].abs().max() > 1e-2
        return (before - after)[:, :20].abs().max().item()

    model = build(**heads, **within, mosa_load_feedback=feedback)
    for name, buffer in selection_buffers(model).items():
        buffer.fill_(1 if name.endswith("updates") else 0.52)
    assert largest_change(model) < 1e-6
    by_choice = build(**heads, **within, mosa_selection="expert_choice")
    assert (largest_change(by_choice) > 1e-3) == (heads["num_mosa_heads"] > 0)  # expert choice looks ahead


def test_thresholds_stay_fp32_and_are_read_again_when_others_change_them(layout: Layout) -> None:
    model = build()
    calibrate(model, 2)
    before = {name: buffer.clone() for name, buffer in selection_buffers(model).items()}
    model.bfloat16()
    for name, buffer in selection_buffers(model).items():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name])
    layer = mosa_layers(model)[0]
    assert not layer.selects_above(training=True)
    state = model.state_dict()
    state["decoder.layers.0.self_attention.mosa_heads.threshold_updates"] = torch.full((6,), 3.0)
    model.load_state_dict(state)
    assert layer.selects_above(training=True)
    assert not mosa_layers(model)[1].selects_above(training=True)


def test_documents_take_their_first_tokens(layout: Layout) -> None:
    model = build(mosa_attend_within_documents=True)
    for name, buffer in selection_buffers(model).items():
        buffer.fill_(1.0 if not name.endswith("updates") else 1000)
    documents = Documents.from_lengths([[5, 20, 7]])
    with recorded_selection(model):
        run(model, random_tokens(0, 1), documents)
    for heads in mosa_layers(model):
        assert heads.selection is not None
        assert heads.selection[1][0, :, :4].tolist() == [[0, 5, 25, 32]] * 6


def test_capacity_is_a_multiple_of_k_and_no_more_than_the_sequence() -> None:
    config = make_config(mosa_sparsity=3.0, mosa_capacity_factor=1.5)
    assert [config.capacity(length) for length in (2, 3, 9, 30, 100)] == [2, 3, 5, 15, math.ceil(1.5 * 33)]
