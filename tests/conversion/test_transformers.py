"""Exported models under transformers' Trainer, accelerate, PEFT and pipelines: what these expect of a causal model."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    pipeline,
)

from megatron_mosa.convert.commands.export_hf import export_hf
from megatron_mosa.convert.model_config import from_transformers
from megatron_mosa.errors import UserError
from megatron_mosa.hf.configuration_mosa import BOUNDS, FEWEST, FLAGS, MosaConfig
from megatron_mosa.hf.heads_mosa import MosaAttention
from megatron_mosa.hf.modeling_mosa import MosaForCausalLM
from megatron_mosa.hf.sparse_mosa import MosaHeads
from tests.conftest import LAUNCHER
from tests.conversion.models import Trained
from tests.decode.models import build, random_tokens

KINDS = ("threshold", "expert_choice")
IGNORED = -100


@pytest.fixture(scope="module")
def folders(trained: dict[str, Trained], causal: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Export one model per kind of selection."""
    folder = tmp_path_factory.mktemp("exports")
    for kind, model in zip(KINDS, (causal, trained["hybrid"]), strict=True):
        export_hf(model.checkpoint, folder / kind, checks_logits=False)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(autouse=True)
def single_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove launcher variables, which accelerate reads, and which the fixtures may have left in the environment."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def load(folder: Path, **options: Any) -> Any:
    """Load an export as a user does, with the modeling code in its folder."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def trainer(model: Any, folder: Path, data: list[dict[str, Tensor]], **options: Any) -> Trainer:
    """Create a Trainer for a single step with learning rate 0 and no effective clipping, unless overridden."""
    named = {name: options.pop(name) for name in ("data_collator", "compute_metrics") if name in options}
    settings = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 1e9, "logging_steps": 1} | options
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        **settings,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data, **named)  # pyright: ignore


def logged(model: Any, folder: Path, data: list[dict[str, Tensor]], **options: Any) -> tuple[float, float]:
    """Train; return loss and gradient norm of the first step."""
    done = trainer(model, folder, data, **options)
    done.train()
    return done.state.log_history[0]["loss"], done.state.log_history[0]["grad_norm"]


def by_hand(model: Any, ids: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean loss in nats over all counted labels, computed one sequence at a time, and the gradient norm."""
    losses = []
    for row, expected in zip(ids, labels, strict=True):
        logs = model(row[None]).logits[0].double().log_softmax(-1)
        losses += [-logs[i - 1, expected[i]] for i in range(1, len(row)) if expected[i] != IGNORED]
    loss = torch.stack(losses).mean()
    loss.backward()
    norm = sum(parameter.grad.double().square().sum() for parameter in model.parameters()).sqrt()
    model.zero_grad()
    return loss.item(), norm.item()


def unequal_labels() -> tuple[Tensor, Tensor]:
    """Return eight sequences [8, 16] with decreasing numbers of counted labels; the last has none."""
    ids = torch.randint(1, 300, (8, 16), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    for number in range(7):
        labels[number, : 1 + 2 * number] = IGNORED
    labels[7] = IGNORED
    return ids, labels


# The loss.


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_micro_batches_are_one_batch(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    ids, labels = unequal_labels()
    data = [{"input_ids": row, "labels": expected} for row, expected in zip(ids, labels, strict=True)]
    loss, norm = by_hand(load(folders[kind]), ids, labels)
    for size, steps in ((8, 1), (1, 8)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        found = logged(load(folders[kind]), tmp_path, data, **options)
        assert found == pytest.approx((loss, norm), rel=1e-4)


@pytest.mark.parametrize("count", [None, 10, torch.tensor(10), torch.tensor(0), torch.tensor(2.5)])
def test_a_micro_batch_without_labels_adds_nothing(count: Any) -> None:
    model, ids = build("hybrid"), random_tokens(2, 9)
    for shape in ((2, 9), (2, 1)):  # a single token has nothing to predict
        labels = torch.full(shape, IGNORED) if shape[1] > 1 else ids[:, :1]
        loss = model(ids[:, : shape[1]], labels=labels, num_items_in_batch=count).loss
        loss.backward()
        assert loss.item() == 0
        assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(("kind", "returns_dict"), [("threshold", True), ("expert_choice", False)])
def test_evaluation_with_padding_and_metrics(
    folders: dict[str, Path], tmp_path: Path, kind: str, returns_dict: bool
) -> None:
    model, tokenizer = load(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    model.config.return_dict = returns_dict
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(1, 300, (length,), generator=generator) for length in (12, 5, 9, 16, 3)]
    right, losses = [], []
    for row in rows:
        logs = model(row[None], return_dict=True).logits[0, :-1].double().log_softmax(-1)
        losses.append(-logs[torch.arange(len(row) - 1), row[1:]])
        right.append((logs.argmax(-1) == row[1:]).tolist())

    def metrics(evaluated: EvalPrediction) -> dict[str, float]:
        assert evaluated.predictions.shape == (5, 16, 384)  # only logits
        correct = (evaluated.predictions[:, :-1].argmax(-1) == evaluated.label_ids[:, 1:]).sum()  # type: ignore
        return {"correct": float(correct)}

    found = trainer(
        model, tmp_path, [{"input_ids": row} for row in rows], per_device_eval_batch_size=2, compute_metrics=metrics,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ).evaluate()  # fmt: skip
    # Trainer averages the batches' mean losses, weighted by the number of sequences.
    batches = [(2, torch.cat(losses[:2])), (2, torch.cat(losses[2:4])), (1, losses[4])]
    expected = sum(size * batch.mean().item() for size, batch in batches) / 5
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_correct"] == sum(map(sum, right))


def test_label_smoothing_uses_the_next_token(folders: dict[str, Path], tmp_path: Path) -> None:
    """Trainer computes it itself, and shifts labels only for models that it knows to be causal."""
    ids, labels = unequal_labels()
    logs = load(folders["threshold"])(ids).logits[:, :-1].double().log_softmax(-1)
    counted = labels[:, 1:] != IGNORED
    right = logs.gather(-1, ids[:, 1:, None])[..., 0][counted].mean()
    expected = -(0.9 * right + 0.1 * logs[counted].mean()).item()
    data = [{"input_ids": row, "labels": expected} for row, expected in zip(ids, labels, strict=True)]
    for size, steps in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        loss, _ = logged(load(folders["threshold"]), tmp_path, data, label_smoothing_factor=0.1, **options)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_bf16_and_checkpointing_in_the_trainer(folders: dict[str, Path], tmp_path: Path) -> None:
    ids, labels = unequal_labels()
    data = [{"input_ids": row, "labels": expected} for row, expected in zip(ids, labels, strict=True)]
    expected = by_hand(load(folders["threshold"]), ids, labels)
    found, types = [], set()
    for checkpoints in (False, True):
        model = load(folders["threshold"])
        model.model.layers[0].mlp.register_forward_hook(lambda *given: types.add(given[-1].dtype))
        found.append(logged(model, tmp_path, data, bf16=True, gradient_checkpointing=checkpoints))
    assert types == {torch.bfloat16}
    assert found[0] == found[1]  # recomputation also runs under autocast
    assert found[0] == pytest.approx(expected, rel=0.05)


# Gradient checkpointing.


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str, reentrant: bool
) -> None:
    calls = []
    forward = MosaAttention.forward

    def counted(self: MosaAttention, *given: Any) -> Tensor:
        calls.append(self)
        return forward(self, *given)

    monkeypatch.setattr(MosaAttention, "forward", counted)
    ids, labels = unequal_labels()
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    gradients = []
    for checkpoints in (False, True):
        model = MosaForCausalLM.from_pretrained(folders[kind]).train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls.clear()
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        assert len(calls) == (4 if checkpoints else 2)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None and expected.any(), name
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-7)


# Several devices.


def split(where: str) -> dict[str, Any]:
    """Return options that offload the second of two layers to ``where``."""
    rest = ("model.embed_tokens", "model.layers.0", "model.norm", "lm_head")
    return {"device_map": dict.fromkeys(rest, "cpu") | {"model.layers.1": where}, "offload_buffers": True}


@torch.no_grad()
def test_layers_can_be_offloaded_to_disk_with_their_thresholds(
    causal: Trained, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(folders["threshold"], offload_folder=tmp_path, **split("disk"))
    heads = model.model.layers[1].self_attn.mosa_heads
    assert heads.thresholds.is_meta and heads.qkv_weight.is_meta  # not loaded until needed
    torch.testing.assert_close(model(causal.tokens).logits, causal.logits, rtol=0, atol=1e-4)
    expected = load(folders["threshold"]).generate(causal.tokens[:, :9], max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(causal.tokens[:, :9], max_new_tokens=6, do_sample=False), expected)


@torch.no_grad()
def test_unset_thresholds_are_refused_when_offloaded_too(folders: dict[str, Path], tmp_path: Path) -> None:
    model = MosaForCausalLM.from_pretrained(folders["threshold"])
    model.model.layers[1].self_attn.mosa_heads.thresholds[3] = torch.nan
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"thresholds of layers 1 are NaN: .* must be between 0 and 1; export the"):
        model(torch.tensor([[1, 2, 3]]))
    one, several = torch.tensor([[1]]), torch.tensor([[1, 2, 3]])
    for call in (
        lambda model: model(several),
        lambda model: model(several, use_cache=True),
        lambda model: model(one, use_cache=True),  # like a decoding step
        lambda model: model.generate(one, max_new_tokens=2),
    ):
        # A new model each time, since a failed call leaves the layer on the compute device.
        model = MosaForCausalLM.from_pretrained(tmp_path / "saved", offload_folder=tmp_path / "disk", **split("disk"))
        with pytest.raises(ValueError, match=r"thresholds of an offloaded layer are NaN: .* must be between"):
            call(model)


def test_thresholds_on_several_devices_are_checked_one_by_one() -> None:
    heads = [module for module in build("pure").modules() if isinstance(module, MosaHeads)]
    model = build("pure").model
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module, device in zip(model.layers, ("cuda:0", "cuda:1", "cpu"), strict=True):
            module.self_attn.mosa_heads.thresholds = torch.empty(len(heads[0].router_weight), device=device)
        with pytest.raises(DataDependentOutputException):  # the check reads a value; fake tensors have none
            model.check_thresholds()


# PEFT.


def adapted(folder: Path, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options
    torch.manual_seed(5)
    return get_peft_model(load(folder), LoraConfig(task_type="CAUSAL_LM", **settings))


@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["qkv_weight", "proj_weight", "router_weight"]}],
)
def test_lora_trains_only_its_adapters_and_merges(
    folders: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    from peft import PeftModel

    model, plain = adapted(folders["threshold"], **options), load(folders["threshold"]).state_dict()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    ids, labels = unequal_labels()
    data = [{"input_ids": row, "labels": expected} for row, expected in zip(ids, labels, strict=True)]
    trainer(model, tmp_path, data, learning_rate=1e-2, gradient_checkpointing=True).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed == {name for name in before if "lora_" in name}
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
        assert not torch.allclose(expected, load(folders["threshold"])(ids).logits, atol=0.1)
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(folders["threshold"]), str(tmp_path / "adapter")).eval()
        assert torch.equal(again(ids).logits, expected)
        prompt = ids[:2, :7]
        generated = model.generate(input_ids=prompt, max_new_tokens=5, do_sample=False)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-3)
        assert torch.equal(merged.generate(prompt, max_new_tokens=5, do_sample=False), generated)
    assert set(merged.state_dict()) == set(plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_get_gradients_with_checkpointing_and_a_frozen_embedding(
    folders: dict[str, Path], reentrant: bool
) -> None:
    """The embedding is frozen, so the first layer's input does not require a gradient."""
    ids, labels = unequal_labels()
    gradients = []
    for checkpoints in (False, True):
        model = adapted(folders["threshold"]).train()
        if checkpoints:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=ids, labels=labels).loss.backward()
        gradients.append([parameter.grad for name, parameter in model.named_parameters() if "lora_" in name])
    for expected, found in zip(*gradients, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens", "lm_head"]])
def test_lora_on_a_tied_model_merges_and_loads_again(tmp_path: Path, targets: str | list[str]) -> None:
    """Adapters of the embedding require untying it first, as PEFT says: merging either would change both weights."""
    from peft import LoraConfig, get_peft_model

    build("hybrid").save_pretrained(tmp_path / "tied")
    tied, ids = targets == "all-linear", random_tokens(2, 13)
    model = MosaForCausalLM.from_pretrained(tmp_path / "tied", tie_word_embeddings=tied).eval()
    if not tied:
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    plain = model(ids).logits
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    adapted: Any = get_peft_model(model, config)
    expected = adapted(ids).logits
    assert (expected - plain).abs().max() > 0.1
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = MosaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.tie_word_embeddings == tied
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["prompt tuning", "IA3"])
def test_prompt_tuning_and_ia3_train_save_and_generate(tmp_path: Path, method: str) -> None:
    from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model

    config: Any = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    if method == "IA3":
        names = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        config = IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False, **names)
    torch.manual_seed(5)
    model, ids = get_peft_model(build("hybrid"), config), random_tokens(2, 9)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer(model, tmp_path, data, learning_rate=1e-2).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed == {name for name in before if "prompt_encoder" in name or "ia3_" in name}
    model.eval().save_pretrained(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(build("hybrid"), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids).logits, expected)
        longer = ids
        for _ in range(6):
            following = again(input_ids=longer).logits[:, -1:].argmax(-1)
            longer = torch.cat((longer, following), dim=1)
        for cached in (True, False):
            options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached, "eos_token_id": None}
            found = again.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            assert torch.equal(found, longer)
        if method == "IA3":
            torch.testing.assert_close(again.merge_and_unload()(ids).logits, expected, rtol=0, atol=1e-4)


def test_prefix_tuning_is_refused() -> None:
    from peft import PrefixTuningConfig, get_peft_model

    ids = random_tokens(2, 9)
    model: Any = get_peft_model(build("hybrid"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    for call in (
        lambda: model(input_ids=ids, labels=ids),
        lambda: model.generate(input_ids=ids, max_new_tokens=2),
        lambda: model.generate(input_ids=ids, max_new_tokens=2, use_cache=False),
    ):
        with pytest.raises(ValueError, match=r"is a DynamicCache; .*; use prompt tuning, IA3 or LoRA instead\)$"):
            call()


# Programs around the model.


@torch.no_grad()
def test_a_compiled_model_computes_the_same(folders: dict[str, Path], causal: Trained) -> None:
    model = torch.compile(load(folders["threshold"]), backend="eager")
    torch.testing.assert_close(model(causal.tokens).logits, causal.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("returns_dict", [True, False])
def test_a_pipeline_gives_the_models_output(folders: dict[str, Path], returns_dict: bool) -> None:
    folder = folders["threshold"]
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    model.config.return_dict = returns_dict
    if returns_dict:
        generator = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    else:
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["to export 7", "to export 12 and import 144 and", "back"]
    found = generator(prompts, max_new_tokens=6, do_sample=False, batch_size=3, return_full_text=False)
    for prompt, answers in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        longer = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert answers[0]["generated_text"] == tokenizer.decode(longer[0, ids.shape[1] :], skip_special_tokens=True)


def test_generation_ends_at_a_stop_string(folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders["threshold"]), AutoTokenizer.from_pretrained(folders["threshold"])
    batch = tokenizer("to export 7", return_tensors="pt")
    whole = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch.input_ids.shape[1] :]
    texts = [tokenizer.decode(whole[:count]) for count in range(1, 9)]
    stop = tokenizer.decode(whole[2])
    expected = next(text for text in texts if stop in text)
    assert len(expected) < len(texts[-1])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    found = model.generate(**batch, stop_strings=[stop], tokenizer=tokenizer, **options)
    assert tokenizer.decode(found[0, batch.input_ids.shape[1] :]) == expected
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    answer = generator("to export 7", stop_sequence=stop, return_full_text=False, **options)
    assert answer[0]["generated_text"] == expected
    with pytest.raises(TypeError, match="unexpected keyword argument 'tokenizer'"):
        model(**batch, tokenizer=tokenizer)


# The configuration.


def refusal(create: Callable[[], Any]) -> str:
    """Return the message of the error that a call raises, or an empty string."""
    try:
        create()
    except (ValueError, UserError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_have_the_bounds_of_training(name: str) -> None:
    content: dict[str, Any] = MosaConfig(num_mosa_heads=4, selection="threshold").to_dict()
    refused = 0
    for value in (-1.0, 0.0, 0.5, 1.0, 1.5, 1e3, 1001.0, 2.0**24, 2.0**24 + 2, 1e12, 2e12, math.inf, math.nan):
        message = refusal(lambda value=value: MosaConfig(**content | {name: value}))
        assert bool(message) == bool(refusal(lambda value=value: from_transformers(content | {name: value}))), value
        assert not message or re.fullmatch(rf"{name} must be (at least|greater than|finite).*, got {value}", message)
        refused += bool(message)
    assert refused >= 3
    for value in (None, "1"):
        assert refusal(lambda value=value: MosaConfig(**content | {name: value})).endswith(f"got {value!r}")


def test_every_number_and_flag_of_the_configuration_is_checked() -> None:
    of_type: dict[str, set[str]] = defaultdict(set)
    for name, argument in signature(MosaConfig.__init__).parameters.items():
        of_type[argument.annotation].add(name)
    assert of_type["float"] == set(BOUNDS)
    assert of_type["int"] | of_type["int | None"] == set(FEWEST)
    assert of_type["bool"] == set(FLAGS)


@pytest.mark.parametrize("name", [*FEWEST, *FLAGS])
def test_sizes_are_integers_and_flags_are_booleans(name: str) -> None:
    words = "True or False" if name in FLAGS else f"an integer of at least {FEWEST[name]}"
    for value in (-1, FEWEST.get(name, 1) - 1, 2.0, "2", [2], *([] if name in FLAGS else [True])):
        assert refusal(lambda value=value: MosaConfig(**{name: value})) == f"{name} must be {words}, got {value!r}"


def test_a_model_checks_what_was_changed_since_its_configuration_was_made(tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_mosa_heads": 2}
    MosaForCausalLM(MosaConfig(**small)).save_pretrained(tmp_path)
    assert MosaForCausalLM.from_pretrained(tmp_path, sparsity=2).config.sparsity == 2
    for name, value in {"sparsity": 0, "local_window": -1, "num_key_value_heads": 3, "head_dim": 7}.items():
        message = refusal(lambda name=name, value=value: MosaForCausalLM.from_pretrained(tmp_path, **{name: value}))
        assert message.startswith(f"{name} must ") and message.endswith(f", got {value}")


def test_token_choice_leaves_each_token_a_head() -> None:
    heads: dict[str, Any] = {"num_mosa_heads": 4, "selection": "token_choice"}
    assert MosaConfig(**heads, sparsity=7.9).heads_per_token == 1
    with pytest.raises(ValueError, match=r"^sparsity=8 leaves each token .* = 0 of num_mosa_heads=4 heads .* below 8$"):
        MosaConfig(**heads, sparsity=8)
