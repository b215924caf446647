"""``mosa checkpoint export --to fp32``: ZeRO shards against DeepSpeed's own merge, and a megatron_mosa checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from megatron_mosa.checkpoint.manifest import find_damage
from megatron_mosa.cli import app
from megatron_mosa.convert.commands.export_fp32 import export_state_dict
from megatron_mosa.convert.commands.inspect import inspect
from megatron_mosa.convert.formats import safetensors as safetensors_folder
from megatron_mosa.errors import RunError, UserError
from tests.conversion.models import Trained
from tests.conversion.test_offline import Evil
from tests.conversion.zero_writer import KINDS, Net, save_zero
from tests.distributed.pool import WorkerPools

NAMES = ["-".join(map(str, kind)) for kind in KINDS]


@pytest.fixture(scope="module")
def saved(workers: WorkerPools, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """For each kind, the checkpoint that two ranks wrote, and the parameters they computed with."""
    folder = tmp_path_factory.mktemp("zero")
    return {
        name: (folder / name, workers(2).run(save_zero, folder / name, number)[0]) for number, name in enumerate(NAMES)
    }


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", NAMES)
def test_merged_shards_equal_deepspeeds_merge(
    saved: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path, name: str
) -> None:
    folder, computed = saved[name]
    done = CliRunner().invoke(app, ["checkpoint", "export", str(folder), str(tmp_path / "out"), "--to", "fp32"])
    assert done.exit_code == 0, done.output
    assert find_damage(tmp_path / "out", reads_all=True) is None
    found = read(tmp_path / "out")
    assert found.keys() == Net().state_dict().keys()
    assert found.pop("count").dtype == torch.int64
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    if name == "1-bf16-fp32":  # DeepSpeed's own merge does not support it
        expected = computed | {"output.weight": computed["embedding.weight"], "scale": torch.full((3,), 0.1)}
        found = {key: tensor.to(expected[key].dtype) for key, tensor in found.items()}
    else:
        merged = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        expected = {key: tensor.contiguous().float() for key, tensor in merged.items() if key != "count"}
        expected.setdefault(
            "frozen.weight", computed["frozen.weight"].float()
        )  # missing from DeepSpeed's merge under ZeRO 1
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    Net().load_state_dict(read(tmp_path / "out"))


def test_a_megatron_mosa_checkpoint(
    trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(safetensors_folder, "_SHARD_BYTES", 20_000)
    model = trained["hybrid"]
    export_state_dict(model.checkpoint.parents[1], tmp_path / "out")
    found = read(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert found.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        assert torch.equal(found[name], weight), name
    capsys.readouterr()
    inspect(tmp_path / "out", full=True)
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["kind"].strip() == "safetensors folder"
    assert facts["health"].strip() == "all hashes of the weights match"
    with pytest.raises(UserError, match="already exists; choose another folder, or pass --force"):
        export_state_dict(model.checkpoint, tmp_path / "out")
    export_state_dict(model.checkpoint, tmp_path / "out", force=True)
    with pytest.raises(UserError, match="--to fp32 accepts a megatron_mosa checkpoint"):
        export_state_dict(tmp_path / "out", tmp_path / "again")
    command = ["checkpoint", "export", str(model.checkpoint), str(tmp_path / "again"), "--to"]
    done = CliRunner().invoke(app, [*command, "fp32", "--dtype", "bfloat16"])
    assert "--dtype, --tokenizer and --no-check apply only to --to hf" in str(done.exception)
    done = CliRunner().invoke(app, [*command, "fp16"])
    assert "--to must be hf, fp32 or torch-dist, got fp16" in str(done.exception)


def test_tags(saved: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path) -> None:
    folder = tmp_path / "zero"
    shutil.copytree(saved[NAMES[0]][0], folder)
    export_state_dict(folder / "global_step2", tmp_path / "tag")
    shutil.copytree(saved[NAMES[1]][0] / "global_step2", folder / "global_step3")
    export_state_dict(folder, tmp_path / "latest")
    assert all(torch.equal(tensor, read(tmp_path / "tag")[key]) for key, tensor in read(tmp_path / "latest").items())
    (folder / "config.json").write_text("{}")  # transformers' Trainer leaves one there
    (folder / "latest").write_text("global_step4")
    with pytest.raises(
        RunError, match="latest names 'global_step4', which is not a tag folder; available: global_step2"
    ):
        export_state_dict(folder, tmp_path / "out")


@pytest.mark.parametrize("name", [NAMES[0], NAMES[-1]])
def test_missing_and_damaged_shards_are_refused(
    saved: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path, name: str
) -> None:
    folder, mark = tmp_path / "zero", tmp_path / "mark"
    tag = folder / "global_step2"

    def refused(message: str, error: type[Exception] = RunError) -> None:
        with pytest.raises(error, match=message):
            export_state_dict(folder, tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"zero"}
        restore()

    def restore() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[name][0], folder)
        return next(tag.glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt"))

    shard = restore()
    shard.unlink()
    refused(rf"{shard.name} is missing; 2 data-parallel ranks wrote")
    next(tag.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")).unlink()
    refused(r"optim_states\.pt is missing; the checkpoint must have been written by ZeRO 1, 2 or 3")
    os.truncate(shard, shard.stat().st_size // 2)
    refused(rf"{shard.name} is corrupt")
    inspect(folder, full=True)
    flip(shard, content=changed_parameter(shard))
    inspect(folder)
    with pytest.raises(RunError, match=rf"is damaged: {shard.name} is corrupt"):
        inspect(folder, full=True)
    refused(rf"{shard.name} is corrupt \(Bad CRC-32")
    for file in (shard, next(tag.glob("*rank_0*model_states.pt"), tag / "mp_rank_00_model_states.pt")):
        content: dict[str, Any] = torch.load(file, weights_only=False)
        torch.save(content | {"more": Evil(mark)}, file)
        refused(rf"{file.name} refers to posix\.mkdir; refused to load it, no code was run")
    content = torch.load(shard, weights_only=False)
    torch.save({"optimizer_state_dict": {"zero_stage": 1}}, shard)
    refused(r"'\w+' is missing; the checkpoint must")
    del content
    shutil.copy(shard, tag / shard.name.replace("mp_rank_00", "mp_rank_01"))
    refused(r"has 2 model-parallel ranks.*only one rank \(mp_rank_00\) is supported", UserError)
    (tag / "layer_0_expert_0_mp_rank_00_model_states.pt").touch()
    refused(r"has files of experts; only models without experts", UserError)


def changed_parameter(shard: Path) -> bytes:
    """Return the bytes of the first eight fp32 elements in a shard."""
    state = torch.load(shard, weights_only=False)["optimizer_state_dict"]
    groups = state.get("single_partition_of_fp32_groups", state.get("fp32_flat_groups"))
    return groups[0][:8].detach().numpy().tobytes()


def flip(file: Path, content: bytes) -> None:
    """Flip one bit of the given bytes in a file."""
    whole = bytearray(file.read_bytes())
    whole[whole.index(content) + 2] ^= 1
    file.write_bytes(whole)
