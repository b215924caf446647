"""Arguments that transformers and its users pass to any model, and torch's inference and autocast modes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from tests.decode.models import build, random_tokens

EXACT = {"rtol": 0, "atol": 1e-5}
IGNORED = -100


@torch.no_grad()
@pytest.mark.parametrize("by_configuration", [False, True])
def test_a_tuple_is_returned_without_return_dict(by_configuration: bool) -> None:
    model, ids = build("hybrid"), random_tokens(2, 9)
    options: dict[str, Any] = {"labels": ids, "output_hidden_states": True}
    expected, generated = model(ids, **options), model.generate(ids, max_new_tokens=4, do_sample=False)
    asked = {} if by_configuration else {"return_dict": False}
    model.config.return_dict = not by_configuration
    found = model(ids, **options, **asked)
    assert type(found) is tuple and len(found) == 3
    assert torch.equal(found[0], expected.loss) and torch.equal(found[1], expected.logits)
    assert all(map(torch.equal, found[2], expected.hidden_states))
    loss, logits, cache = model(ids, labels=ids, use_cache=True, **asked)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits) and cache.get_seq_length() == 9
    base = model.model(ids, **asked)
    assert type(base) is tuple and torch.equal(base[0], expected.hidden_states[-1])
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)


LAST = torch.arange(13) >= 10
KEPT = {
    "the last": (3, lambda logits: logits[:, 10:]),
    "all": (0, lambda logits: logits),
    "indices": (torch.tensor([7, 2]), lambda logits: logits[:, [7, 2]]),
    "a list": ([7, 2], lambda logits: logits[:, [7, 2]]),
    "indices of each": (
        torch.tensor([[0, 5], [12, 3]]),
        lambda logits: torch.stack((logits[0, [0, 5]], logits[1, [12, 3]])),
    ),
    "a mask": (
        torch.stack((LAST, ~LAST)),
        lambda logits: torch.cat((logits[0, 10:], logits[1, :10])),
    ),
    "a mask of positions": (LAST, lambda logits: logits[:, 10:]),
}


@torch.no_grad()
@pytest.mark.parametrize("form", KEPT)
def test_logits_and_loss_at_selected_positions(form: str) -> None:
    keep, chosen = KEPT[form]
    model, ids = build("hybrid"), random_tokens(2, 13)
    labels = ids.clone()
    labels[0, 6] = labels[1, :3] = IGNORED
    whole = model(ids).logits
    assert torch.equal(model(ids, logits_to_keep=keep).logits, chosen(whole))
    found = model(ids, logits_to_keep=keep, labels=labels)
    assert torch.equal(found.logits, chosen(whole))
    losses = torch.full(ids.shape, torch.nan, dtype=torch.float64)  # of the token after each position
    for row in range(2):
        for position in range(12):
            if labels[row, position + 1] != IGNORED:
                losses[row, position] = -whole[row, position].double().log_softmax(-1)[labels[row, position + 1]]
    torch.testing.assert_close(found.loss.double(), chosen(losses).nanmean(), rtol=1e-6, atol=0)


@torch.no_grad()
def test_hidden_states_by_argument_and_by_configuration() -> None:
    model, ids = build("hybrid"), random_tokens(2, 9)
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert model(ids).hidden_states is None
    seen.clear()
    by_argument = model(ids, output_hidden_states=True)
    model.config.output_hidden_states = True
    assert model(ids, output_hidden_states=False).hidden_states is None
    for found in (by_argument.hidden_states, model(ids).hidden_states, model.model(ids).hidden_states):
        first, *between, last = found
        assert torch.equal(first, model.model.embed_tokens(ids))
        assert len(between) == 2 and all(map(torch.equal, between, seen))
        assert torch.equal(last, model.model.norm(seen[2]))
    generated = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True)
    assert torch.equal(generated.hidden_states[0][-1], by_argument.hidden_states[-1])


@torch.no_grad()
def test_a_mistyped_argument_is_refused_with_a_suggestion() -> None:
    model, ids = build("hybrid"), random_tokens(2, 9)
    for call, name, similar in (
        (model, "lables", "labels"),
        (model, "atention_mask", "attention_mask"),
        (model, "return_dicts", "return_dict"),
        (model.model, "output_hidden_state", "output_hidden_states"),
    ):
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'; did you mean '{similar}'\?$"):
            call(ids, **{name: ids})
    with pytest.raises(TypeError, match=r"argument 'zzz'; it takes input_ids, attention_mask, .*, return_dict$"):
        model(ids, zzz=None)
    for name, similar in (("max_new_token", "max_new_tokens"), ("attention_msk", "attention_mask")):
        with pytest.raises(ValueError, match=rf"\['{name}'\].*; did you mean '{similar}'\?$"):
            model.generate(ids, **{name: 3})


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "local", "fixed", "pure", "chosen", "routing"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (4,)])
def test_inputs_without_tokens_are_refused(kind: str, shape: tuple[int, ...]) -> None:
    model, ids = build(kind), torch.zeros(shape, dtype=torch.long)
    for name, inputs, sizes in (("input_ids", ids, "B, T"), ("inputs_embeds", torch.zeros(*shape, 24), "B, T, h")):
        message = re.escape(f"{name} must be of shape [{sizes}], with one sequence and one token or more, got [")
        with pytest.raises(ValueError, match=f"^{message}"):
            model(**{name: inputs})


@torch.no_grad()
def test_unsupported_arguments_are_refused_only_if_they_would_have_an_effect() -> None:
    model, ids = build("hybrid"), random_tokens(2, 9)
    expected = model(ids).logits
    without_effect: dict[str, list[Any]] = {
        "position_ids": [None],
        "output_attentions": [None, False],
        "token_type_ids": [None, torch.zeros_like(ids)],
        "cache_position": [None, torch.arange(9)],
    }
    with_effect = {"position_ids": torch.arange(9)[None], "output_attentions": True, "token_type_ids": ids}
    for name, values in without_effect.items():
        for value in values:
            assert torch.equal(model(ids, **{name: value}).logits, expected)
    model.generate(ids, max_new_tokens=2, position_ids=None, output_attentions=False)
    for name, value in with_effect.items():
        for call in (model, model.model):
            with pytest.raises(ValueError, match=f"^{name} is not supported: .*; omit {name}$"):
                call(ids, **{name: value})
        with pytest.raises(ValueError, match=f"{name}"):
            model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, **{name: value})
    with pytest.raises(ValueError, match=r"\); token_type_ids is not supported: all tokens .*; omit token_type_ids$"):
        model.generate(ids, max_new_tokens=2, token_type_ids=torch.zeros_like(ids))
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="^output_attentions is not supported"):
        model(ids)
    assert torch.equal(model(ids, output_attentions=False).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "value"), [("cache_implementation", "static"), ("cache_implementation", "dynamic"),
                        ("prompt_lookup_num_tokens", 2), ("assistant_early_exit", 1)],
)  # fmt: skip
def test_unsupported_generate_options_are_refused_by_name(name: str, value: Any) -> None:
    ids = random_tokens(2, 9)
    model = build("hybrid")
    ways: list[Callable[[], Any]] = [
        lambda: model.generate(ids, max_new_tokens=2, **{name: value}),
        lambda: model.generate(ids, generation_config=GenerationConfig(max_new_tokens=2, **{name: value})),
        lambda: model.generate(ids, GenerationConfig(max_new_tokens=2, **{name: value})),
        lambda: model.generate(ids, max_new_tokens=2),
    ]
    for number, way in enumerate(ways):
        if number == len(ways) - 1:
            setattr(model.generation_config, name, value)
        with pytest.raises(ValueError, match=f"^{name}={value!r} is not supported: .*; omit {name}$"):
            way()


@torch.no_grad()
def test_assistant_models_and_continuous_batching_are_refused() -> None:
    model, ids = build("hybrid"), random_tokens(1, 9)
    with pytest.raises(ValueError, match=r"^assistant_model is not supported: a MosaCache cannot remove"):
        model.generate(ids, max_new_tokens=2, assistant_model=build("dense"))
    if hasattr(GenerationMixin, "generate_batch"):  # not in all supported versions
        with pytest.raises(ValueError, match=r"^continuous batching is not supported: .* as one batch, padded"):
            model.generate_batch(ids.tolist(), generation_config=GenerationConfig(max_new_tokens=2))


# Modes of torch.


@pytest.mark.parametrize("kind", ["hybrid", "followed"])
@pytest.mark.parametrize("inference_first", [True, False])
def test_a_cache_can_be_continued_in_another_mode(kind: str, inference_first: bool) -> None:
    model, ids = build(kind), random_tokens(2, 24)
    with torch.no_grad():
        expected = model(ids).logits
    cache, parts = model.new_cache(), []
    modes = (torch.inference_mode, torch.no_grad) if inference_first else (torch.no_grad, torch.inference_mode)
    for number, start in enumerate((0, 10, 11, 12, 17, 18, 23)):
        end = (10, 11, 12, 17, 18, 23, 24)[number]
        with modes[number % 2]():
            parts.append(model(ids[:, start:end], past_key_values=cache).logits.clone())
        if number == 3:  # between calls, outside of both modes
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hybrid", "followed"])
@pytest.mark.parametrize("autocast_first", [True, False])
def test_a_cache_can_be_continued_with_and_without_autocast(kind: str, autocast_first: bool) -> None:
    model, ids = build(kind), random_tokens(2, 24)
    expected = model(ids).logits
    cache, parts, start = model.new_cache(), [], 0
    for number, count in enumerate((9, 9, 1, 1, 1, 1, 2)):
        with torch.autocast("cpu", torch.bfloat16, enabled=(number % 2 == 0) == autocast_first):
            parts.append(model(ids[:, start : start + count], past_key_values=cache).logits.float())
        start += count
    found = torch.cat(parts, dim=1)
    # In bf16 a score may fall on the other side of its threshold, which adds or removes a whole token.
    assert (found - expected).norm() < 0.1 * expected.norm()
