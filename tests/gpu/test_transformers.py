"""Models whose layers accelerate distributes over two GPUs compute the same as on one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_mosa.hf.cache_mosa import MosaCache
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
    pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed"),
]
CLOSE = {"rtol": 0, "atol": 1e-3}  # fp32 on both, without TF32
BY_HAND = {
    "model.embed_tokens": 1,
    "model.layers.0": 0,
    "model.layers.1": 1,
    "model.layers.2": 1,
    "model.layers.3": 0,
    "model.norm": 1,
    "lm_head": 0,
}
SELECTIONS = ("threshold", "expert_choice")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save a model with all kinds of heads for each selection, with transformers."""
    folder = tmp_path_factory.mktemp("models")
    for selection in SELECTIONS:
        config = MosaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, head_dim=16, num_dense_heads=4,
            num_key_value_heads=2, num_local_heads=2, local_window=6, num_mosa_heads=6, sparsity=4,
            max_position_embeddings=64, selection=selection,
        )  # fmt: skip
        model = MosaForCausalLM(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                center = float("norm" in name and "weight" in name)
                parameter.copy_(center + 0.2 * torch.randn(parameter.shape, generator=generator))
            for buffer in model.buffers():
                buffer.copy_(0.5 + 0.3 * torch.rand(buffer.shape, generator=generator))
        model.save_pretrained(folder / selection)
    return {selection: folder / selection for selection in SELECTIONS}


def load(folder: Path, device_map: Any) -> Any:
    # A layer has 230 KB; accelerate reserves room for another one beside those that it places on a device.
    limits = {0: "600KB", 1: "10GB"} if device_map == "auto" else None
    return MosaForCausalLM.from_pretrained(folder, device_map=device_map, max_memory=limits).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(1)).cuda()


def devices(model: torch.nn.Module) -> set[int]:
    return {parameter.device.index for parameter in model.parameters()}


@pytest.mark.parametrize("device_map", ["auto", BY_HAND], ids=["auto", "by hand"])
@pytest.mark.parametrize("selection", SELECTIONS)
@torch.no_grad()
def test_the_forward_pass_matches_one_gpu(folders: dict[str, Path], selection: str, device_map: Any) -> None:
    one, two = load(folders[selection], {"": 0}), load(folders[selection], device_map)
    assert devices(one) == {0} and devices(two) == {0, 1}
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[1, 30:] = mask[2, :7] = 0
    labels = ids.masked_fill(mask == 0, -100)
    valid = mask.bool()
    for options in ({}, {"attention_mask": mask, "labels": labels, "output_hidden_states": True}):
        expected, found = one(ids, **options), two(ids, **options)
        torch.testing.assert_close(found.logits.to(ids.device)[valid], expected.logits[valid], **CLOSE)
    torch.testing.assert_close(found.loss.to(ids.device), expected.loss, **CLOSE)
    keep = torch.tensor([[5, 20], [3, 7], [39, 12]], device=ids.device)
    part = two(ids, attention_mask=mask, logits_to_keep=keep, labels=labels).logits
    rows = torch.arange(3, device=ids.device)[:, None]
    torch.testing.assert_close(part.to(ids.device), found.logits.to(ids.device)[rows, keep], **CLOSE)


@pytest.mark.parametrize("device_map", ["auto", BY_HAND], ids=["auto", "by hand"])
@torch.no_grad()
def test_generation_matches_one_gpu(folders: dict[str, Path], device_map: Any) -> None:
    one, two = load(folders["threshold"], {"": 0}), load(folders["threshold"], device_map)
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for options in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "prefill_chunk_size": 5}):
        settings = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0, **options}
        assert torch.equal(two.generate(ids, **settings), one.generate(ids, **settings))
    found = two.generate(ids, max_new_tokens=4, pad_token_id=0, do_sample=False, return_dict_in_generate=True)
    cache = found[CACHE]
    assert isinstance(cache, MosaCache)
    kept = {
        layer.mosa.keys.device.index for layer in cache.layers if layer.mosa is not None and layer.mosa.keys is not None
    }
    assert kept == {0, 1}  # each layer's cache is on its device


@torch.no_grad()
def test_unset_thresholds_are_refused(folders: dict[str, Path]) -> None:
    model = load(folders["threshold"], BY_HAND)
    model.model.layers[2].self_attn.mosa_heads.thresholds[0] = torch.nan
    with pytest.raises(ValueError, match=r"thresholds of layers 2 are NaN"):
        model(tokens(1, 4))


@pytest.mark.parametrize("checkpoints", [False, True])
def test_steps_of_the_trainer_match_one_gpu(
    folders: dict[str, Path], tmp_path: Path, checkpoints: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer, TrainingArguments

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    rows = tokens(4, 24).cpu()
    data = [{"input_ids": row, "labels": row} for row in rows]
    logged, weights = [], []
    for device_map in ({"": 0}, BY_HAND):
        model = load(folders["threshold"], device_map)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=0.1, optim="sgd", logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=checkpoints, seed=1,
        )  # fmt: skip
        if device_map != BY_HAND and arguments.n_gpu > 1:
            arguments._n_gpu = 1  # not torch's DataParallel over all GPUs
        trainer = Trainer(model=model, args=arguments, train_dataset=data)  # pyright: ignore[reportArgumentType]
        trainer.train()
        logged.append([(line["loss"], line["grad_norm"]) for line in trainer.state.log_history[:2]])
        weights.append({name: parameter.detach().cpu() for name, parameter in model.named_parameters()})
    for one, two in zip(*logged, strict=True):
        assert two == pytest.approx(one, rel=1e-3)
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=0, atol=1e-4)
