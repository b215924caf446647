"""``mosa checkpoint causalize`` calibrates thresholds for an expert-choice model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_mosa.__main__ import main
from megatron_mosa.checkpoint.manifest import find_damage
from megatron_mosa.checkpoint.reader import StateReader
from megatron_mosa.config import load_config
from megatron_mosa.convert.commands.causalize import causalize
from megatron_mosa.convert.logits import megatron_logits
from megatron_mosa.convert.model_reader import open_model
from megatron_mosa.convert.weights import lacks_thresholds
from megatron_mosa.data import build_dataset, tokenizer_hash
from megatron_mosa.errors import UserError
from tests.conversion.models import QUICKSTART, Trained


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a small dataset from files of the standard library."""
    folder = tmp_path_factory.mktemp("calibration")
    texts = folder / "texts"
    texts.mkdir()
    for name in ("ast.py", "argparse.py", "bdb.py", "calendar.py", "cmd.py", "copy.py"):
        (texts / name).write_text((Path(os.__file__).parent / name).read_text())
    options = [f"data.path={folder}/data", f"data.sources=[{texts}]", "data.vocab_size=300"]
    build_dataset(load_config(QUICKSTART, [*options, "data.validation_fraction=0.3"]).data)
    return folder / "data"


def copy_with_data(model: Trained, data: Path, folder: Path) -> Path:
    """Copy a checkpoint as if the model had been trained on the dataset."""
    copy = folder / "checkpoints" / "step-00000012"
    shutil.copytree(model.checkpoint, copy)
    metadata = json.loads((copy / "metadata.json").read_text())
    metadata["data"] |= {"tokenizer_hash": tokenizer_hash(data / "tokenizer.json"), "index_samples": 64}
    metadata["config"]["data"] |= {"path": str(data), "index_path": str(folder / "index")}
    metadata["format_version"] = 1  # ignores the manifest, which has the hash of the original file
    (copy / "metadata.json").write_text(json.dumps(metadata))
    return copy


def test_heads_select_their_share_and_the_model_is_causal(
    trained: dict[str, Trained], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = copy_with_data(trained["pure"], data, tmp_path)
    with pytest.raises(SystemExit, match="0"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["mosa", "checkpoint", "causalize", str(tmp_path), str(tmp_path / "out"), "--samples", "40",
                        "--load-feedback", "0.2"],
        )  # fmt: skip
        main()
    assert "calibrated thresholds of 6 heads per layer on 40 training sequences; loss on" in capsys.readouterr().out
    assert find_damage(tmp_path / "out", reads_all=True) is None
    before, after = StateReader(checkpoint), StateReader(tmp_path / "out")
    new = {key for key in after.tensors if "threshold" in key}
    assert new == {
        f"model.decoder.layers.{layer}.self_attention.mosa_heads.{name}"
        for layer in (0, 1)
        for name in ("thresholds", "threshold_updates")
    }
    assert after.tensors.keys() - new == {key for key in before.tensors if key.startswith("model.")}
    assert all(torch.equal(before.read(key), after.read(key)) for key in after.tensors.keys() - new)

    model = open_model(tmp_path / "out")
    assert (model.config.mosa.selection, model.config.mosa.load_feedback) == ("threshold", 0.2)
    # Inputs of the first layer do not depend on selections, so its thresholds are the quantiles of its scores.
    from megatron_mosa.config.schema import DataSection
    from megatron_mosa.data import TrainingSamples, open_mixture

    samples = TrainingSamples(
        open_mixture(DataSection(path=str(data))), sequence_length=40, index_samples=64, seed=1234,
        index_path=tmp_path / "index",
    )  # fmt: skip
    tokens = torch.stack([samples[number]["tokens"] for number in range(40)])  # [40, T]
    read = after.read
    states = read("model.embedding.word_embeddings.weight")[tokens]
    layer = "model.decoder.layers.0."
    states = torch.nn.functional.layer_norm(
        states, (24,), read(f"{layer}input_layernorm.weight"), read(f"{layer}input_layernorm.bias"), 1e-5
    )
    scores = (states @ read(f"{layer}self_attention.mosa_heads.router_weight").T).sigmoid()  # [40, T, E]
    found = (scores > read(f"{layer}self_attention.mosa_heads.thresholds")).float().mean(dim=(0, 1))
    assert (found - 0.25).abs().max() < 0.1  # all occurrences of a token have the same score here
    assert (found.mean() - 0.25).abs() < 0.05

    whole = megatron_logits(model.config, model.vocab_rows, model.read, tokens[:2])
    prefix = megatron_logits(model.config, model.vocab_rows, model.read, tokens[:2, :17])
    torch.testing.assert_close(whole[:, :17], prefix, rtol=0, atol=1e-4)


def test_thresholds_that_no_update_has_set_can_be_calibrated(unset: Trained, data: Path, tmp_path: Path) -> None:
    copy_with_data(unset, data, tmp_path)
    causalize(tmp_path, tmp_path / "out", samples=4)
    after = open_model(tmp_path / "out")
    assert not lacks_thresholds(after.weights, after.read)
    assert (after.read("decoder.layers.1.self_attention.mosa_heads.thresholds") > 0).all()


def test_unsupported_models_and_datasets_are_refused(
    trained: dict[str, Trained], causal: Trained, data: Path, tmp_path: Path
) -> None:
    for model, message in (
        (trained["dense"], "has no MoSA heads"),
        (causal, "already selects by thresholds"),
        (trained["hybrid"], "mosa.selection_scope=document"),
        (trained["routing"], r"has Routing heads \(model.num_routing_heads=4\)"),
    ):
        with pytest.raises(UserError, match=message):
            causalize(model.checkpoint, tmp_path / "out")
    with pytest.raises(UserError, match="another tokenizer .* --data FOLDER"):
        causalize(trained["pure"].checkpoint, tmp_path / "out", data=data)
    with pytest.raises(UserError, match="mosa data build"):
        causalize(trained["pure"].checkpoint, tmp_path / "out", data=tmp_path / "nothing")
    assert not (tmp_path / "out").exists()
