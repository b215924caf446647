"""transformers' ``generate`` with a cache gives the same tokens as forward passes on the whole sequence."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import logging

from megatron_mosa.hf import MODELING_FILES
from megatron_mosa.hf.cache_mosa import MosaCache
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM
from tests.decode.models import KINDS, build, random_tokens

NEW = 12


def by_hand(model: MosaForCausalLM, prompt: Tensor, new: int = NEW) -> Tensor:
    """Extend tokens [T] greedily by ``new`` tokens, calling the model on the whole sequence each time."""
    tokens = prompt[None]
    for _ in range(new):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    return tokens[0]


def greedy(model: MosaForCausalLM, tokens: Tensor | None, **options: Any) -> Any:
    return model.generate(tokens, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_greedy_decoding_with_prompts_of_different_lengths(kind: str) -> None:
    model, tokens = build(kind), random_tokens(3, 17)
    mask = torch.ones_like(tokens)
    mask[1, :16] = mask[2, :6] = 0
    found = greedy(model, tokens * mask, attention_mask=mask)
    for number, start in enumerate((0, 16, 6)):
        assert torch.equal(found[number, start:], by_hand(model, tokens[number, start:]))
    again = greedy(model, tokens * mask, attention_mask=mask, prefill_chunk_size=5)
    assert torch.equal(again, found)


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 20, "temperature": 1.3}, {"num_beams": 3}])
@torch.no_grad()
def test_sampling_and_beams_match_those_without_a_cache(options: dict[str, Any]) -> None:
    model, tokens = build("hybrid"), random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(
            model.generate(
                tokens, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, use_cache=use_cache, **options
            )
        )
    assert torch.equal(*results) and results[0].shape == (2, 9 + NEW)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
@torch.no_grad()
def test_embeddings_give_the_same_tokens_as_ids(options: dict[str, Any]) -> None:
    model, tokens = build("hybrid"), random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    expected = greedy(model, tokens, attention_mask=mask, **options)
    options = options | {"inputs_embeds": model.get_input_embeddings()(tokens), "attention_mask": mask}
    assert torch.equal(greedy(model, None, **options), expected[:, 9:])
    assert torch.equal(greedy(model, tokens, **options), expected)


@pytest.mark.parametrize("options", [{}, {"causal_approximation": "prefix"}])
def test_embeddings_need_a_causal_model_and_are_read_at_once(options: dict[str, Any]) -> None:
    model = build("hybrid", "expert_choice")
    states = model.get_input_embeddings()(random_tokens(2, 9))
    message = r"^cannot generate from inputs_embeds: .*num_mosa_heads=6.*; pass input_ids with causal_approximation="
    with pytest.raises(ValueError, match=message):
        greedy(model, None, inputs_embeds=states, **options)
    with pytest.raises(ValueError, match=r"^prefill_chunk_size=4 is not supported with inputs_embeds: .*; omit"):
        greedy(build("hybrid"), None, inputs_embeds=states, prefill_chunk_size=4)


@torch.no_grad()
def test_a_cache_is_used_returned_and_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("hybrid"), random_tokens(2, 9)
    lengths = []
    forward = type(model.model).forward

    def counting(self: Any, input_ids: Tensor, **others: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, **others)

    monkeypatch.setattr(type(model.model), "forward", counting)
    first = greedy(model, tokens, return_dict_in_generate=True)
    assert lengths == [9] + [1] * (NEW - 1)
    cache = first[CACHE]
    assert isinstance(cache, MosaCache) and cache.get_seq_length() == 9 + NEW - 1
    more = greedy(model, first.sequences, **{CACHE: cache})
    assert lengths[NEW:] == [1] * NEW
    assert torch.equal(more[0], by_hand(model, tokens[0], 2 * NEW))
    assert all(count > 1 for count in uncached(model, tokens, lengths))


def uncached(model: MosaForCausalLM, tokens: Tensor, lengths: list[int]) -> list[int]:
    """Return the number of tokens of every call without a cache."""
    lengths.clear()
    greedy(model, tokens, use_cache=False)
    return lengths


@torch.no_grad()
def test_expert_choice_is_refused_unless_an_approximation_is_requested(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = build("hybrid", "expert_choice"), random_tokens(1, 9)
    with pytest.raises(ValueError, match=r"^cannot generate: num_mosa_heads=6 with selection='expert_choice'"):
        greedy(model, tokens)
    with pytest.raises(ValueError, match=r"causal_approximation must be 'prefix', got 'window'"):
        greedy(model, tokens, causal_approximation="window")
    with pytest.raises(ValueError, match=r"use_cache must be False .* changes the selection.*; set use_cache=False"):
        model(tokens, use_cache=True)
    with pytest.raises(ValueError, match=r"causal_approximation must be None for a causal model, got 'prefix'"):
        greedy(build("hybrid"), tokens, causal_approximation="prefix")
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.get_logger("megatron_mosa.hf.modeling_mosa"), "propagate", True)
    found = greedy(model, tokens, causal_approximation="prefix")
    assert torch.equal(found[0], by_hand(model, tokens[0]))
    assert "heads select from the prefix anew for every token, unlike in training" in caplog.text


@torch.no_grad()
def test_empty_and_long_prompts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("hybrid"), random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[1] = 0
    empty: list[tuple[Tensor | None, dict[str, Tensor]]] = [(None, {}), (tokens[:, :0], {})]
    for prompt, options in [*empty, (tokens, {"attention_mask": mask})]:
        with pytest.raises(ValueError, match=r"^a prompt is empty; pass at least one token in each"):
            model.generate(prompt, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match=r"attention_mask is 0 throughout sequence 1"):
        model(tokens, attention_mask=mask)
    monkeypatch.setattr(logging.get_logger("megatron_mosa.hf.modeling_mosa"), "propagate", True)
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    long = random_tokens(1, 70)
    assert torch.equal(greedy(model, long)[0], by_hand(model, long[0]))
    assert "the prompt has 70 tokens, but the model was trained on at most 64" in caplog.text


ELSEWHERE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron_mosa":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
case = torch.load(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(case["folder"], trust_remote_code=True, dtype=torch.float32)
found = model.generate(case["tokens"], attention_mask=case["mask"], max_new_tokens=12, do_sample=False, pad_token_id=0)
assert torch.equal(found, case["expected"])
assert type(model.new_cache()).__name__ == "MosaCache"
"""


@torch.no_grad()
def test_it_works_from_a_folder_alone(tmp_path: Path) -> None:
    model, tokens = build("hybrid"), random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    model.config.auto_map = {
        "AutoConfig": "configuration_mosa.MosaConfig",
        "AutoModelForCausalLM": "modeling_mosa.MosaForCausalLM",
    }
    model.save_pretrained(tmp_path / "model")
    for file in MODELING_FILES:
        shutil.copyfile(file, tmp_path / "model" / file.name)
    expected = greedy(model, tokens, attention_mask=mask)
    case = {"folder": str(tmp_path / "model"), "tokens": tokens, "mask": mask, "expected": expected}
    torch.save(case, tmp_path / "case.pt")
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run(
        [sys.executable, "-P", "-c", ELSEWHERE, str(tmp_path / "case.pt")],
        cwd=tmp_path, env=environment, timeout=240, check=True, capture_output=True, text=True,
    )  # fmt: skip
