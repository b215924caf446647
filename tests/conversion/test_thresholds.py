"""Thresholds of MoSA heads in conversions: they belong to the model, but no optimizer updates them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_mosa.checkpoint.reader import StateReader
from megatron_mosa.config import load_config
from megatron_mosa.convert.commands.export_fp32 import export_state_dict
from megatron_mosa.convert.commands.export_hf import export_hf
from megatron_mosa.convert.commands.import_model import import_hf
from megatron_mosa.convert.commands.inspect import inspect
from megatron_mosa.convert.commands.reshard import reshard
from megatron_mosa.convert.commands.verify import verify
from megatron_mosa.convert.initial import find_initial_weights
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.tools.decoding.loading import check_thresholds, load_model
from tests.conversion.models import CAUSAL, KINDS, QUICKSTART, TINY, Trained
from tests.conversion.test_reshard import shards

HEADS = "decoder.layers.1.self_attention.mosa_heads."


def test_reshard_splits_thresholds_with_their_heads(causal: Trained, tmp_path: Path) -> None:
    reshard(causal.checkpoint, tmp_path / "two", tensor_parallel=2)
    found = shards(tmp_path / "two")
    for name in ("thresholds", "threshold_updates"):
        assert found[f"model.{HEADS}{name}"] == [((0,), (3,)), ((3,), (3,))]
        assert f"exp_avg.{HEADS}{name}" not in found
    verify(causal.checkpoint, tmp_path / "two")
    reshard(tmp_path / "two", tmp_path / "bare", tensor_parallel=1, drop_optimizer=True)
    verify(causal.checkpoint, tmp_path / "bare")


def test_inspect_and_fp32_export_include_thresholds(
    causal: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect(causal.checkpoint, full=True)
    printed = capsys.readouterr().out
    assert "6 MoSA with thresholds" in printed and "optimizer state  Adam's moments" in printed
    export_state_dict(causal.checkpoint, tmp_path / "fp32")
    (file,) = (tmp_path / "fp32").glob("*.safetensors")
    thresholds = StateReader(causal.checkpoint).read(f"model.{HEADS}thresholds")
    assert torch.equal(load_file(file)[f"{HEADS}thresholds"], thresholds)
    reshard(causal.checkpoint, tmp_path / "bare", drop_optimizer=True)
    inspect(tmp_path / "bare")
    assert "optimizer state  none" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_keeps_thresholds_in_fp32_and_is_imported_as_calibrated(
    causal: Trained, tmp_path: Path, dtype: str
) -> None:
    export_hf(causal.checkpoint, tmp_path / "hf", dtype=dtype)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["selection"] == "threshold"
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    tensors, state = load_file(file), StateReader(causal.checkpoint)
    found = tensors["model.layers.1.self_attn.mosa_heads.thresholds"]
    assert found.dtype == torch.float32
    assert torch.equal(found, state.read(f"model.{HEADS}thresholds"))
    assert not [name for name in tensors if "updates" in name]
    import_hf(tmp_path / "hf", tmp_path / "back")
    back = StateReader(tmp_path / "back")
    assert torch.equal(back.read(f"model.{HEADS}thresholds"), found)
    assert (back.read(f"model.{HEADS}threshold_updates") > 10_000).all()  # longer than any warm-up
    verify(tmp_path / "hf", tmp_path / "back")  # the number of updates is not part of an exported model
    if dtype == "float32":
        verify(causal.checkpoint, tmp_path / "hf")
        verify(causal.checkpoint, tmp_path / "back")


def test_thresholds_that_no_update_has_set_never_count_as_calibrated(
    unset: Trained, causal: Trained, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no optimizer step has set its thresholds.* pass --no-check to export NaN"):
        export_hf(unset.checkpoint, tmp_path / "hf")
    export_hf(unset.checkpoint, tmp_path / "hf", checks_logits=False)
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    assert load_file(file)["model.layers.1.self_attn.mosa_heads.thresholds"].isnan().all()
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "thresholds of MoSA heads are not set" in card and "All heads are causal" not in card
    model, _ = load_model(unset.checkpoint, "cpu", "float32", lambda *_: None)  # as mosa generate does
    with pytest.raises(UserError, match="thresholds of layers 0, 1 are NaN: they are not calibrated"):
        check_thresholds(model, unset.checkpoint)
    import_hf(tmp_path / "hf", tmp_path / "back")
    back = StateReader(tmp_path / "back")
    for name in ("thresholds", "threshold_updates"):
        assert not back.read(f"model.{HEADS}{name}").any()
    verify(unset.checkpoint, tmp_path / "hf")
    verify(tmp_path / "hf", tmp_path / "back")
    with pytest.raises(RunError, match=f"no optimizer step has set the thresholds of '{unset.checkpoint}', so its"):
        verify(causal.checkpoint, unset.checkpoint)


def test_verify_detects_different_thresholds(causal: Trained, tmp_path: Path) -> None:
    export_hf(causal.checkpoint, tmp_path / "hf", checks_logits=False)
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    thresholds = load_file(file)["model.layers.1.self_attn.mosa_heads.thresholds"].numpy().tobytes()
    offset = bytes(content).index(thresholds)
    content[offset + 2] ^= 64
    file.write_bytes(content)
    (tmp_path / "hf" / "manifest.json").unlink()
    with pytest.raises(RunError, match="layers.1.self_attention.mosa_heads.thresholds differs most"):
        verify(causal.checkpoint, tmp_path / "hf", compares_logits=False)


def test_runs_of_either_selection_can_start_from_weights_of_either(
    causal: Trained, trained: dict[str, Trained], tmp_path: Path
) -> None:
    """A threshold run starts its warm-up if the checkpoint has no thresholds; expert choice needs none."""
    identity = {"vocab_size": 300, "tokenizer_hash": None}
    pure = trained["pure"].checkpoint
    for folder, options in (
        (pure, KINDS["pure"]),
        (pure, [*KINDS["pure"], "mosa.selection=threshold"]),
        (causal.checkpoint, CAUSAL),
        (causal.checkpoint, [*CAUSAL, "mosa.selection=expert_choice", "mosa.load_feedback=0"]),
    ):
        identity["tokenizer_hash"] = json.loads((folder / "metadata.json").read_text())["data"]["tokenizer_hash"]
        config = load_config(QUICKSTART, [*TINY, *options])
        assert find_initial_weights(folder, config, identity, reads_all=False) == folder
    with pytest.raises(UserError, match="holds another model: decoder.layers.0.self_attention.dense_heads"):
        find_initial_weights(
            causal.checkpoint, load_config(QUICKSTART, [*TINY, *KINDS["pure"]]), identity, reads_all=False
        )
