"""Import: bitwise equal to what was exported, or to a Llama of transformers; and starting a run from the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from megatron_mosa.checkpoint import load_initial_weights, read_metadata
from megatron_mosa.checkpoint.manifest import files_below, find_damage, hash_files
from megatron_mosa.checkpoint.reader import StateReader
from megatron_mosa.config import load_config
from megatron_mosa.convert import changed_settings, find_initial_weights
from megatron_mosa.convert.commands.export_hf import export_hf
from megatron_mosa.convert.commands.import_model import import_hf
from megatron_mosa.convert.formats.mosa import CheckpointReader
from megatron_mosa.convert.logits import largest_divergence, megatron_logits
from megatron_mosa.convert.model_config import model_config
from megatron_mosa.engine import DeepSpeedEngine
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import MosaModel
from megatron_mosa.parallel import destroy_parallel, initialize_parallel
from tests.conversion.models import KINDS, QUICKSTART, TINY, Trained


@pytest.mark.parametrize("kind", KINDS)
def test_the_round_trip_is_bit_exact(trained: dict[str, Trained], tmp_path: Path, kind: str) -> None:
    model = trained[kind]
    export_hf(model.checkpoint, tmp_path / "out", checks_logits=False)
    before = hash_files(tmp_path / "out", files_below(tmp_path / "out"))
    import_hf(tmp_path / "out", tmp_path / "back")
    assert hash_files(tmp_path / "out", files_below(tmp_path / "out")) == before
    original, back = StateReader(model.checkpoint), StateReader(tmp_path / "back")
    assert back.weights == original.weights and not back.has_optimizer_state
    for name in original.weights:
        assert torch.equal(original.read(f"model.{name}"), back.read(f"model.{name}")), name
    assert find_damage(tmp_path / "back", reads_all=True) is None
    metadata = read_metadata(tmp_path / "back")
    assert (metadata.step, metadata.data["vocab_size"]) == (0, 300)
    # The other keys depend on where the model ran, or have their derived values filled in.
    dropped = {"backend", "vocab_size_multiple"}
    described = model_config(metadata.config)
    for section in ("model", "mosa"):
        asked, found = vars(getattr(model.config, section)), vars(getattr(described, section))
        if asked.get("num_local_heads"):
            asked = asked | {"local_window": asked["local_window"] or 40 // 4}
        assert {key: value for key, value in asked.items() if key not in dropped} == {
            key: value for key, value in found.items() if key not in dropped
        }


def test_an_imported_model_can_be_exported_again(trained: dict[str, Trained], tmp_path: Path) -> None:
    export_hf(trained["hybrid"].checkpoint, tmp_path / "out", checks_logits=False)
    import_hf(tmp_path / "out", tmp_path / "back")
    export_hf(tmp_path / "back", tmp_path / "again", tokenizer=tmp_path / "out")
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize(("groups", "tied"), [(2, False), (4, True)])
def test_a_llama_is_imported(tmp_path: Path, groups: int, tied: bool) -> None:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=groups, max_position_embeddings=64, rms_norm_eps=1e-4, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0}, initializer_range=0.2,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "llama")
    if tied:  # as in older files: a copy of the embedding, and a buffer
        tensors = load_file(tmp_path / "llama" / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        save_file(tensors, tmp_path / "llama" / "model.safetensors")
    import_hf(tmp_path / "llama", tmp_path / "out")
    source = CheckpointReader.open(tmp_path / "out", read_metadata(tmp_path / "out"))
    tokens = torch.randint(101, (2, 50))
    found = megatron_logits(source.config, source.vocab_rows, source.read, tokens)
    expected = llama(tokens).logits.detach()
    assert expected.std() > 0.3
    assert largest_divergence(expected, found) < 1e-9
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_unsupported_llamas_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    good = LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1).to_dict()
    for change, message in (
        ({"attention_bias": True}, r"attention_bias=True is not supported; for a Llama it must be False"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, r"rope_type=llama3 is not supported"),
        ({"model_type": "gpt2"}, r"model_type must be mosa or llama, got gpt2"),
        ({"model_type": ["llama"]}, r"model_type must be mosa or llama, got \['llama'\]"),
        ({"rope_parameters": "x"}, r"config.json: rope_parameters \(or rope_scaling\) must be an object, got 'x'"),
        ({"rms_norm_eps": "1e-5"}, r"^config.json: rms_norm_eps must be of type float, got '1e-5'"),
        ({"vocab_size": "300"}, r"^config.json: vocab_size must be of type int, got '300'"),
        ({"num_key_value_heads": 8}, r"^config.json: num_key_value_heads=8 does not divide num_attention_heads=4"),
        ({}, r"contains neither model.safetensors.index.json nor model.safetensors; save the model with safetensors"),
        ({"VARIANT": "fp16"}, r"nor model.safetensors; save the model without a variant"),
    ):
        if "VARIANT" in change:
            (tmp_path / "model.fp16.safetensors").touch()
        file.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message):
            import_hf(tmp_path, tmp_path.with_name("out"))
    del good["hidden_size"]
    file.write_text(json.dumps(good))
    with pytest.raises(UserError, match=r"config.json: hidden_size is missing"):
        import_hf(tmp_path, tmp_path.with_name("out"))
    file.write_text("{")
    with pytest.raises(RunError, match=r"is damaged: config.json is damaged"):
        import_hf(tmp_path, tmp_path.with_name("out"))
    assert not tmp_path.with_name("out").exists()


@pytest.mark.parametrize("kind", ["mosa", "llama"])
def test_a_base_model_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = (
        LlamaModel(LlamaConfig(**sizes, num_attention_heads=2)) if kind == "llama" else MosaModel(MosaConfig(**sizes))
    )
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"holds only the base model, .*; save AutoModelForCausalLM instead$"):
        import_hf(tmp_path / "base", tmp_path / "out")


def test_damaged_and_mismatched_files_are_refused(trained: dict[str, Trained], tmp_path: Path) -> None:
    folder, out = tmp_path / "hf", tmp_path / "out"
    export_hf(trained["pure"].checkpoint, folder, checks_logits=False)
    shard = folder / "model-00001-of-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:])
    with pytest.raises(RunError, match=r"model-00001-of-00001.safetensors is corrupt: its hash is"):
        import_hf(folder, out)
    (folder / "manifest.json").unlink()
    shard.write_bytes(whole[:-50])
    with pytest.raises(RunError, match=r"model-00001-of-00001.safetensors is damaged \("):
        import_hf(folder, out)
    shard.unlink()
    with pytest.raises(RunError, match=r"model-00001-of-00001.safetensors cannot be read \("):
        import_hf(folder, out)
    shard.write_bytes(whole)
    tensors = load_file(shard)
    key = "model.layers.1.self_attn.mosa_heads.router_weight"
    for change, message in (
        ({}, rf"{key} is missing, expected \(6, 24\)"),
        ({key: torch.zeros(3, 24)}, rf"{key} is \(3, 24\), expected \(6, 24\)"),
        ({key: tensors[key], "more": torch.zeros(1)}, r"more is \(1,\), expected none"),
        ({key: tensors[key].double()}, rf"{key} has dtype F64, but must be F32, BF16, F16 "),
    ):
        save_file({name: tensor for name, tensor in tensors.items() if name != key} | change, shard)
        with pytest.raises(UserError, match=message):
            import_hf(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_run_starts_from_imported_weights(trained: dict[str, Trained], tmp_path: Path) -> None:
    model = trained["hybrid"]
    export_hf(model.checkpoint, tmp_path / "out", checks_logits=False)
    import_hf(tmp_path / "out", tmp_path / "back")
    config, identity = model.config, read_metadata(model.checkpoint).data
    longer = load_config(QUICKSTART, [*TINY, *KINDS["hybrid"], "mosa.sparsity=8", "data.sequence_length=80"])
    changes = changed_settings(read_metadata(tmp_path / "back").config, longer)
    assert changes == (f"mosa.sparsity=8.0 (not {config.mosa.sparsity})",)
    assert not changed_settings(read_metadata(tmp_path / "back").config, config)
    for asked in (config, longer):
        assert find_initial_weights(tmp_path / "back", asked, identity, reads_all=True) == tmp_path / "back"
    layout = initialize_parallel(1, seed=1)
    try:
        engine = DeepSpeedEngine(config, 300, layout)
        assert not torch.equal(engine.state()["model.output_layer.weight"], model.weights["output_layer.weight"])
        load_initial_weights(engine, tmp_path / "back")
        state, steps = engine.state(), engine.optimizer_step()
        parameters = dict(engine.module.named_parameters())
        engine.destroy()
    finally:
        destroy_parallel()
    assert steps == 0
    for name, weight in model.weights.items():
        assert torch.equal(state[f"model.{name}"], weight) and torch.equal(parameters[name].detach(), weight), name
        assert not state[f"exp_avg.{name}"].any() and not state[f"exp_avg_sq.{name}"].any()


def test_weights_that_do_not_fit_a_run(trained: dict[str, Trained], tmp_path: Path) -> None:
    model = trained["hybrid"]
    identity = read_metadata(model.checkpoint).data
    other = load_config(QUICKSTART, [*TINY, *KINDS["hybrid"], "mosa.num_heads=4"])
    name = "decoder.layers.0.self_attention.mosa_heads.proj_weight"
    message = (
        rf"checkpoint.initialize_from: .* holds another model: {name} is \(6, 8, 24\), but the run expects \(4, 8, 24\)"
    )
    with pytest.raises(UserError, match=message):
        find_initial_weights(model.checkpoint, other, identity, reads_all=False)
    twice = ["model.num_dense_heads=8", "model.num_query_groups=4", "model.head_dim=4"]  # the same shapes
    narrow = load_config(QUICKSTART, [*TINY, *KINDS["dense"], *twice])
    with pytest.raises(UserError, match=r"holds another model: model.head_dim is 8, but the run asks for 4; set model"):
        find_initial_weights(trained["dense"].checkpoint, narrow, identity, reads_all=False)
    clusters = load_config(QUICKSTART, [*TINY, *KINDS["routing"], "model.routing_clusters=3"])
    message = r"routing_heads.centroids is \(4, 5, 8\), but the run expects \(4, 3, 8\); set sections model and mosa"
    with pytest.raises(UserError, match=message):
        find_initial_weights(trained["routing"].checkpoint, clusters, identity, reads_all=False)
    rows = load_config(QUICKSTART, [*TINY, *KINDS["hybrid"], "model.vocab_size_multiple=400"])  # the checkpoint has 384
    with pytest.raises(
        UserError, match=r"\(384, 24\), but the run expects \(400, 24\); set model.vocab_size_multiple=384$"
    ):
        find_initial_weights(model.checkpoint, rows, identity, reads_all=False)
    with pytest.raises(UserError, match=r"was trained with another tokenizer"):
        find_initial_weights(model.checkpoint, model.config, identity | {"tokenizer_hash": "0"}, reads_all=False)
    with pytest.raises(UserError, match=r"checkpoint.initialize_from: '.*nothing' does not exist"):
        find_initial_weights(tmp_path / "nothing", model.config, identity, reads_all=False)
    export_hf(model.checkpoint, tmp_path / "hf", checks_logits=False)
    with pytest.raises(UserError, match=r"import it first: mosa checkpoint import .*/hf OUT --from hf"):
        find_initial_weights(tmp_path / "hf", model.config, identity, reads_all=False)
    damaged = tmp_path / "step-00000012"
    shutil.copytree(model.checkpoint, damaged)
    (damaged / "state" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged: state/__0_0.distcp has 0 bytes"):
        find_initial_weights(damaged, model.config, identity, reads_all=False)


def test_fresh_mosa_heads_change_nothing_until_they_learn(trained: dict[str, Trained], tmp_path: Path) -> None:
    export_hf(trained["dense"].checkpoint, tmp_path / "dense", checks_logits=False)
    import_hf(tmp_path / "dense", tmp_path / "hybrid", add_mosa_heads=6, sparsity=4.0)
    source = CheckpointReader.open(tmp_path / "hybrid", read_metadata(tmp_path / "hybrid"))
    assert (source.config.mosa.num_heads, source.config.mosa.sparsity) == (6, 4.0)
    model = trained["dense"]
    found = megatron_logits(source.config, source.vocab_rows, source.read, model.tokens)
    torch.testing.assert_close(found, model.logits, rtol=0, atol=1e-5)
    heads = "decoder.layers.1.self_attention.mosa_heads."
    for name, bound in (("router_weight", 24**-0.5), ("qkv_weight", 24**-0.5)):  # 1 / sqrt(h), 1 / sqrt(3h')
        weight = source.read(heads + name)
        assert 0.8 * bound < weight.abs().max() <= bound and not torch.equal(
            weight, source.read(heads.replace("1", "0") + name)
        )
    assert not source.read(heads + "proj_weight").any()
    for options, message in ((dict(sparsity=0.5), "sparsity"), (dict(add_mosa_heads=-1), "num_heads")):
        with pytest.raises(UserError, match=message):
            import_hf(tmp_path / "dense", tmp_path / "no", **{"add_mosa_heads": 2} | options)
    export_hf(trained["pure"].checkpoint, tmp_path / "pure", checks_logits=False)
    with pytest.raises(UserError, match="already has MoSA heads; omit the option"):
        import_hf(tmp_path / "pure", tmp_path / "no", add_mosa_heads=2)
    assert not (tmp_path / "no").exists()
