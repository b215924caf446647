"""Reading checkpoints offline, the layout of weights, and ``mosa checkpoint inspect``."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_mosa.checkpoint.manifest import DamagedError
from megatron_mosa.checkpoint.reader import StateReader
from megatron_mosa.config import Config
from megatron_mosa.convert.commands.inspect import inspect
from megatron_mosa.convert.weights import GateAndUp, GroupedQkv, model_weights
from megatron_mosa.errors import RunError, UserError
from tests.conversion.models import KINDS, Trained


def unfolded(name: str, weight: Tensor, config: Config) -> Tensor:
    """Convert a gated MLP's first matrix to checkpoint layout, [2, n, h]: gate, then up."""
    gated = name.endswith("linear_fc1.weight") and config.model.activation == "swiglu"
    half = len(weight) // 2
    return torch.stack((weight[:half], weight[half:])) if gated else weight


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_equals_the_models_weights(trained: dict[str, Trained], kind: str) -> None:
    model = trained[kind]
    state = StateReader(model.checkpoint)
    assert state.has_optimizer_state
    untrained = {name for name in state.weights if name.endswith(("head_bias", "centroids"))}
    assert len(untrained) == (2 if kind in ("chosen", "routing") else 0)
    assert state.weights.keys() - untrained == model.weights.keys()
    for name, weight in model.weights.items():
        expected = unfolded(name, weight, model.config)
        assert (state.weights[name].shape, state.weights[name].dtype) == (expected.shape, torch.float32)
        assert torch.equal(state.read(f"model.{name}"), expected), name
    assert len(state.tensors) == 3 * len(model.weights) + len(untrained)


@pytest.mark.parametrize("kind", KINDS)
def test_model_weights_describes_every_parameter(trained: dict[str, Trained], kind: str) -> None:
    model = trained[kind]
    described = {weight.name: weight.shape for weight in model_weights(model.config, 384) if weight.is_trained}
    expected = {name: unfolded(name, weight, model.config).shape for name, weight in model.weights.items()}
    assert described == {name: tuple(shape) for name, shape in expected.items()}


def test_grouped_queries_by_hand() -> None:
    """Two groups of three queries: q0 q1 q2 k0 v0 q3 q4 q5 k1 v1, each of two channels."""
    order = ["q0", "q1", "q2", "k0", "v0", "q3", "q4", "q5", "k1", "v1"]
    rows = torch.arange(20.0)[:, None].expand(20, 3)
    rows_of = {name: [2 * number, 2 * number + 1] for number, name in enumerate(order)}
    layout = GroupedQkv(heads=6, groups=2, head_dim=2)
    parts = layout.split(rows)
    for part, kind, count in zip(parts, "qkv", (6, 2, 2), strict=True):
        assert part[:, 0].tolist() == [row for head in range(count) for row in rows_of[f"{kind}{head}"]]
    assert torch.equal(layout.join(parts), rows)
    pair = torch.randn(2, 5, 3)
    assert torch.equal(GateAndUp().split(pair)[0], pair[0]) and torch.equal(GateAndUp().join(pair.unbind()), pair)


class Evil:
    """Creates a directory when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_an_index_that_would_run_code_is_refused(trained: dict[str, Trained], tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    shutil.copytree(trained["pure"].checkpoint, path)
    (path / "state" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    with pytest.raises(DamagedError, match=r"refers to posix.mkdir, which no checkpoint needs; refused"):
        StateReader(path)
    assert not (tmp_path / "mark").exists()
    index = pickle.loads((trained["pure"].checkpoint / "state" / ".metadata").read_bytes())
    for info in index.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (path / "state" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(DamagedError, match=r"refers to a file outside of its folder: \.\./__0_0.distcp"):
        StateReader(path)
    (path / "state" / ".metadata").write_bytes(b"\x80\x04 nothing")
    with pytest.raises(DamagedError, match=r"state/.metadata is damaged"):
        StateReader(path)


def test_a_truncated_file_is_named(trained: dict[str, Trained], tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    shutil.copytree(trained["pure"].checkpoint, path)
    os.truncate(path / "state" / "__0_0.distcp", 5000)
    state = StateReader(path)
    with pytest.raises(DamagedError, match=r"^state/__0_0\.distcp: '.*' cannot be read \(."):
        for key in state.tensors:
            state.read(key)
    with pytest.raises(RunError, match=r"is damaged: state/__0_0.distcp has 5000 bytes instead of"):
        inspect(path)


def test_inspect_describes_a_checkpoint(trained: dict[str, Trained], capsys: pytest.CaptureFixture[str]) -> None:
    model = trained["hybrid"]
    for path in (model.checkpoint, model.checkpoint.parent, model.checkpoint.parents[1]):
        inspect(path)
        facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
        assert facts["path"].strip() == str(model.checkpoint)
        assert facts["kind"].strip() == "megatron_mosa checkpoint"
        assert facts["step"].strip() == "12 (optimizer step 11, 192 samples)"
        assert "2 dense, 2 local, 6 MoSA" in facts["model"]
        count = sum(weight.numel() for weight in model.weights.values())
        assert facts["parameters"].strip().startswith(f"{count:,} in {len(model.weights)} tensors")
        assert facts["optimizer state"].strip() == "Adam's moments"
        assert "sizes" in facts["health"]


@pytest.mark.parametrize(("kind", "heads"), [("dense", "0 MoSA\n"), ("pure", "6 MoSA with thresholds\n")])
def test_inspect_names_the_selection_of_mosa_heads_that_exist(
    kind: str, heads: str, trained: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step-00000001"
    shutil.copytree(trained[kind].checkpoint, path)
    metadata = json.loads((path / "metadata.json").read_text())
    metadata["config"]["mosa"]["selection"] = "threshold"
    metadata["format_version"] = 1  # ignores the manifest, which has the hash of the original file
    (path / "metadata.json").write_text(json.dumps(metadata))
    inspect(path)
    assert heads in capsys.readouterr().out


def test_inspect_finds_a_flipped_bit_when_asked(trained: dict[str, Trained], tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    shutil.copytree(trained["pure"].checkpoint, path)
    content = bytearray((path / "state" / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 4
    (path / "state" / "__0_0.distcp").write_bytes(content)
    inspect(path)
    with pytest.raises(RunError, match=r"state/__0_0.distcp is corrupt"):
        inspect(path, full=True)


def test_inspect_never_unpickles_deepspeed_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        for rank in range(2):
            (folder / f"mp_rank_0{rank}_model_states.pt").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
            for part in range(4):
                (folder / f"bf16_zero_pp_rank_{part}_mp_rank_0{rank}_optim_states.pt").touch()
        os.utime(folder, (step, step))
    (tmp_path / "latest").write_text("global_step10")
    inspect(tmp_path)
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["kind"].strip() == "DeepSpeed checkpoint" and facts["latest"].strip() == "global_step10"
    assert (facts["model-parallel ranks"].strip(), facts["ZeRO ranks"].strip()) == ("2", "4")
    assert not (tmp_path / "mark").exists()
    for name in ("bf16_zero_pp_rank_3_mp_rank_01_optim_states.pt", "mp_rank_01_model_states.pt"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(RunError, match=f"is damaged: {name} is missing"):
            inspect(tmp_path)
        (folder / name).write_bytes(content)


def test_inspect_verifies_the_deepspeed_tag_that_latest_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 10, 15):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        torch.save({"weight": torch.ones(100)}, folder / "mp_rank_00_model_states.pt")
        os.utime(folder, (step, step))
    latest, file = tmp_path / "latest", tmp_path / "global_step10" / "mp_rank_00_model_states.pt"
    latest.write_text("global_step10")
    inspect(tmp_path, full=True)
    assert "all files of global_step10 match their checksums" in capsys.readouterr().out
    content = bytearray(file.read_bytes())
    content[content.index(torch.ones(100).numpy().tobytes())] ^= 1
    file.write_bytes(content)
    (tmp_path / "global_step5" / "mp_rank_01_model_states.pt").symlink_to("nowhere")
    cases = {
        b"global_step10": "mp_rank_00_model_states.pt is corrupt",
        b"global_step5": r"mp_rank_01_model_states.pt cannot be read \(No such file or directory\)",
        b"global_step20": "latest names 'global_step20', which is not a tag folder",
        b"\xff\n\xfe": r"latest names '\ufffd\\n\ufffd', which is not a tag folder",
    }
    for name, damage in cases.items():
        latest.write_bytes(name)
        with pytest.raises(RunError, match=f"is damaged: {damage}"):
            inspect(tmp_path, full=True)


def test_inspect_refuses_folders_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"does not contain a model; pass a checkpoint"):
        inspect(tmp_path)
    (tmp_path / "checkpoints-of-mine").mkdir()
    monkeypatch.chdir(tmp_path.parent)
    for folder in (tmp_path, Path(tmp_path.name)):  # a suggestion can be pasted
        with pytest.raises(UserError, match=rf"does not exist \(did you mean '{folder}/checkpoints-of-mine'"):
            inspect(folder / "checkpoint-of-mine")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a PEFT adapter, not a model; merge it first"):
        inspect(tmp_path)


def test_reading_offline_does_not_import_deepspeed() -> None:
    code = "import sys, megatron_mosa.convert.commands.inspect; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
