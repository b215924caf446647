"""Reading and writing Megatron-LM's torch_dist format, against Megatron-core's own models and checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from megatron_mosa.checkpoint import read_metadata
from megatron_mosa.checkpoint.manifest import find_damage
from megatron_mosa.checkpoint.reader import StateReader
from megatron_mosa.cli import app
from megatron_mosa.convert.commands.export_torch_dist import export_torch_dist
from megatron_mosa.convert.commands.import_model import import_model
from megatron_mosa.convert.commands.inspect import inspect
from megatron_mosa.convert.commands.verify import verify
from megatron_mosa.convert.formats.megatron_args import to_megatron_args
from megatron_mosa.convert.locate import Kind
from megatron_mosa.convert.logits import megatron_logits
from megatron_mosa.convert.model_reader import open_model
from megatron_mosa.errors import RunError, UserError
from tests.conversion.megatron_lm import (
    ARGUMENTS,
    OTHER_ARGUMENTS,
    ROWS,
    WAYS,
    load_gpt,
    on_two_ranks,
    one_rank,
    save_gpt,
)
from tests.conversion.models import Trained
from tests.conversion.test_offline import Evil
from tests.distributed.pool import WorkerPools

TOKENS = torch.randint(ROWS, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Save a checkpoint with Megatron-core; return its folder and its model's logits."""
    folder = tmp_path_factory.mktemp("theirs") / "gpt"
    with one_rank():
        return folder, save_gpt(ARGUMENTS, 1, folder, "stacked", TOKENS)


def our_logits(path: Path) -> Tensor:
    model = open_model(path)
    return megatron_logits(model.config, model.vocab_rows, model.read, TOKENS)


@pytest.mark.parametrize("kind", ["dense", "gelu"])
def test_megatron_loads_an_export(trained: dict[str, Trained], workers: WorkerPools, tmp_path: Path, kind: str) -> None:
    model = trained[kind]
    done = CliRunner().invoke(
        app, ["checkpoint", "export", str(model.checkpoint), str(tmp_path / "out"), "--to", "torch-dist"]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "0"
    iteration = tmp_path / "out" / "iter_0000000"
    arguments = vars(torch.load(iteration / "common.pt", weights_only=False)["args"])
    with one_rank():
        found = load_gpt(arguments, 1, iteration, model.tokens)
    torch.testing.assert_close(found, model.logits, rtol=0, atol=2e-5)
    split = workers(2).run(on_two_ranks, load_gpt, arguments, iteration, model.tokens)
    torch.testing.assert_close(split[0], model.logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("arguments", [ARGUMENTS, OTHER_ARGUMENTS], ids=["swiglu", "gelu"])
@pytest.mark.parametrize("way", WAYS)
def test_a_megatron_checkpoint_is_imported(tmp_path: Path, arguments: dict[str, Any], way: str) -> None:
    with one_rank():
        expected = save_gpt(arguments, 1, tmp_path / "gpt", way, TOKENS)
    import_model(Kind.TORCH_DIST, tmp_path / "gpt", tmp_path / "out")
    assert find_damage(tmp_path / "out", reads_all=True) is None
    assert read_metadata(tmp_path / "out").step == 0
    torch.testing.assert_close(our_logits(tmp_path / "out"), expected, rtol=0, atol=1e-4)
    verify(tmp_path / "gpt" / "iter_0000007", tmp_path / "out", compares_logits=False)


@pytest.mark.parametrize("way", ["stacked", "separate halves"])
def test_a_checkpoint_of_two_ranks_is_imported(workers: WorkerPools, tmp_path: Path, way: str) -> None:
    expected = workers(2).run(on_two_ranks, save_gpt, ARGUMENTS, tmp_path / "gpt", way, TOKENS)[0]
    done = CliRunner().invoke(
        app, ["checkpoint", "import", str(tmp_path / "gpt"), str(tmp_path / "out"), "--from", "torch-dist"]
    )
    assert done.exit_code == 0, done.output
    torch.testing.assert_close(our_logits(tmp_path / "out"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "gelu"])
def test_the_round_trip_is_exact(trained: dict[str, Trained], tmp_path: Path, kind: str) -> None:
    export_torch_dist(trained[kind].checkpoint, tmp_path / "out")
    import_model(Kind.TORCH_DIST, tmp_path / "out", tmp_path / "back")
    before, after = StateReader(trained[kind].checkpoint), StateReader(tmp_path / "back")
    assert before.weights == after.weights
    for name in before.weights:
        assert torch.equal(before.read(f"model.{name}"), after.read(f"model.{name}")), name
    verify(trained[kind].checkpoint, tmp_path / "back")


def test_weights_in_bf16_and_fresh_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fresh heads do not change the output at first."""
    with one_rank():
        expected = save_gpt(ARGUMENTS, 1, tmp_path / "gpt", "stacked", TOKENS, dtype=torch.bfloat16)
    inspect(tmp_path / "gpt")
    assert "bfloat16" in capsys.readouterr().out
    torch.testing.assert_close(our_logits(tmp_path / "gpt"), expected, rtol=0, atol=1e-4)
    import_model(Kind.TORCH_DIST, tmp_path / "gpt", tmp_path / "out", add_mosa_heads=4, sparsity=4.0)
    assert open_model(tmp_path / "out").config.mosa.num_heads == 4
    torch.testing.assert_close(our_logits(tmp_path / "out"), expected, rtol=0, atol=1e-4)


def test_separate_norms_and_unknown_tensors(theirs: tuple[Path, Tensor], tmp_path: Path) -> None:
    """Norms may be separate modules and optimizer state is ignored, but an unknown weight is refused."""
    index = pickle.loads((theirs[0] / "iter_0000007" / ".metadata").read_bytes())
    folder = tmp_path / "gpt"

    def rename(old: str, new: str) -> None:
        index.state_dict_metadata = {key.replace(old, new): entry for key, entry in index.state_dict_metadata.items()}
        for item in list(index.storage_data):
            info = index.storage_data.pop(item)
            index.storage_data[type(item)(item.fqn.replace(old, new), item.offset, item.index)] = info
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(theirs[0], folder)
        (folder / "iter_0000007" / ".metadata").write_bytes(pickle.dumps(index))

    rename("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    rename("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    torch.testing.assert_close(our_logits(folder), theirs[1], rtol=0, atol=1e-4)
    embedding = index.state_dict_metadata["embedding.word_embeddings.weight"]
    index.state_dict_metadata["optimizer.state.exp_avg.embedding.word_embeddings.weight"] = embedding
    rename("nothing", "new")
    open_model(folder)
    index.state_dict_metadata["decoder.layers.self_attention.linear_qkv.bias"] = embedding
    rename("nothing", "new")
    with pytest.raises(
        UserError, match=r"linear_qkv\.bias is not supported; only weights of dense GPT layers without biases"
    ):
        open_model(folder)


def test_a_checkpoint_of_megatron_core_0_19(theirs: tuple[Path, Tensor], tmp_path: Path) -> None:
    """Non-tensor content is stored in torch's files, and arguments have other names."""
    arguments = ARGUMENTS | {"layernorm_epsilon": ARGUMENTS["norm_epsilon"]}
    del arguments["norm_epsilon"]
    folder, mark = tmp_path / "gpt", tmp_path / "mark"

    def write(**more: object) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with one_rank():
            save_gpt(arguments | more, 1, folder, "stacked", TOKENS, common_file=False)
        assert not (folder / "iter_0000007" / "common.pt").exists()

    write(exit_signal=signal.SIGTERM, where=tmp_path)
    torch.testing.assert_close(our_logits(folder), theirs[1], rtol=0, atol=1e-4)
    write(more=Evil(mark))
    with pytest.raises(RunError, match=r"common_state/shard_0_1 refers to posix\.mkdir; refused"):
        import_model(Kind.TORCH_DIST, folder, tmp_path / "out")
    assert not mark.exists()


_UNSUPPORTED = (
    ("pure", "mosa.num_heads=6"),
    ("local", "model.num_local_heads=4"),
    ("fixed", "model.num_fixed_heads=4"),
    ("routing", "model.num_routing_heads=4"),
)


def test_heads_that_megatron_does_not_support(trained: dict[str, Trained], tmp_path: Path) -> None:
    for kind, key in _UNSUPPORTED:
        with pytest.raises(UserError, match=f"{key} has no counterpart in Megatron-LM.*must be 0 for --to torch-dist"):
            export_torch_dist(trained[kind].checkpoint, tmp_path / "out")
    gated = replace(trained["gelu"].config.model, attention_gate=True)
    with pytest.raises(
        UserError, match="attention_gate=true has no counterpart in Megatron-LM.*must be false for --to"
    ):
        to_megatron_args(replace(trained["gelu"].config, model=gated), 384)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, r"args\.num_experts=8 is not supported; it must be None"),
        ({"add_bias_linear": True}, r"args\.add_bias_linear=True is not supported; it must be False"),
        (
            {"position_embedding_type": "learned_absolute"},
            r"position_embedding_type=learned_absolute .*it must be rope",
        ),
        ({"qk_layernorm": True}, r"args\.qk_layernorm=True"),
        ({"kv_channels": None}, r"head_dim"),
        ({"num_query_groups": 4}, r"linear_qkv\.weight is \(3, 64, 24\), expected \(3, 96, 24\)"),
        ({"num_layers": 2}, r"layer_norm_weight is \(3, 24\), expected \(2, 24\)"),
        ({"untie_embeddings_and_output_weights": False}, r"output_layer\.weight is not supported"),
    ],
)
def test_unsupported_models_are_refused(
    theirs: tuple[Path, Tensor], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "gpt"
    shutil.copytree(theirs[0], folder)
    torch.save({"args": Namespace(**ARGUMENTS | changes)}, folder / "iter_0000007" / "common.pt")
    with pytest.raises(UserError, match=message):
        import_model(Kind.TORCH_DIST, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_and_files_that_would_run_code_are_refused(theirs: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, out, mark = tmp_path / "gpt", tmp_path / "out", tmp_path / "mark"
    iteration = folder / "iter_0000007"

    def refused(message: str, error: type[Exception] = RunError) -> None:
        with pytest.raises(error, match=message):
            import_model(Kind.TORCH_DIST, folder, out)
        restore()

    def restore() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(theirs[0], folder)
        torch.save({"args": Namespace(**ARGUMENTS)}, iteration / "common.pt")  # 0.19 does not write it

    restore()
    torch.save({"args": Evil(mark)}, iteration / "common.pt")
    refused(r"common\.pt refers to posix\.mkdir; refused to load it, no code was run")
    torch.save({"args": Namespace(**ARGUMENTS, more=Evil(mark))}, iteration / "common.pt")
    refused(r"common\.pt refers to posix\.mkdir")
    (iteration / ".metadata").write_bytes(pickle.dumps(Evil(mark)))
    refused(r"iter_0000007/\.metadata refers to posix\.mkdir")
    torch.save({"iteration": 7}, iteration / "common.pt")
    refused("does not contain args", UserError)
    os.truncate(iteration / "common.pt", 500)
    refused(r"common\.pt is damaged")
    (iteration / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 2})
    )
    refused(r"sharded_backend_version in metadata\.json must be 1, got 2", UserError)
    shard = max(iteration.glob("*.distcp"), key=lambda file: file.stat().st_size)
    shard.unlink()
    with pytest.raises(RunError, match=f"iter_0000007/{shard.name} is missing"):
        inspect(folder)
    refused(rf"iter_0000007/{shard.name} cannot be read")
    os.truncate(shard, 1000)
    with pytest.raises(RunError, match=f"iter_0000007/{shard.name} has 1,000 bytes; its entries need "):
        inspect(folder)
    refused(rf"iter_0000007/{shard.name} is corrupt")
    index = StateReader(iteration, "")._metadata.storage_data
    stored = next(info for item, info in index.items() if item.fqn == "output_layer.weight")
    content = bytearray((iteration / stored.relative_path).read_bytes())
    content[stored.offset + stored.length // 2] ^= 4
    (iteration / stored.relative_path).write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        inspect(folder, full=True)
    refused(rf"iter_0000007/{stored.relative_path} is corrupt \(Bad CRC-32")
    assert not mark.exists() and not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"gpt"}


def test_inspect_and_targets(
    theirs: tuple[Path, Tensor], trained: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(theirs[0], full=True)
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["kind"].strip() == "Megatron-LM torch_dist checkpoint"
    assert (facts["iteration"].strip(), facts["optimizer state"].strip()) == ("iter_0000007", "none")
    assert "checksums" in facts["health"] and facts["types"].strip() == "float32"
    checkpoint = trained["dense"].checkpoint
    export_torch_dist(checkpoint, tmp_path / "out")
    with pytest.raises(UserError, match="already exists; choose another folder, or pass --force to replace it"):
        export_torch_dist(checkpoint, tmp_path / "out")
    export_torch_dist(checkpoint, tmp_path / "out", force=True)
    (tmp_path / "out" / "iter_0000000" / "common.pt").unlink()
    with pytest.raises(RunError, match=r"common\.pt cannot be read"):
        import_model(Kind.TORCH_DIST, tmp_path / "out", tmp_path / "back")
    with pytest.raises(RunError, match=r"is damaged: common\.pt is missing"):
        inspect(tmp_path / "out")
    with pytest.raises(UserError, match="is a megatron_mosa checkpoint; pass a Megatron-LM torch_dist checkpoint"):
        import_model(Kind.TORCH_DIST, checkpoint, tmp_path / "back")
    done = CliRunner().invoke(app, ["checkpoint", "import", str(tmp_path), str(tmp_path / "x"), "--from", "torch"])
    assert "--from must be hf, torch-dist or mosa-pytorch, got torch" in str(done.exception)
