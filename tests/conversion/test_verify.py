"""``mosa checkpoint verify`` accepts equal models, and finds and names a single changed number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_mosa.checkpoint.manifest import MANIFEST, files_below, hash_files, write_manifest
from megatron_mosa.checkpoint.reader import StateReader
from megatron_mosa.checkpoint.writer import write_state_offline
from megatron_mosa.cli import app
from megatron_mosa.convert.commands.export_hf import export_hf
from megatron_mosa.convert.commands.verify import verify
from megatron_mosa.errors import RunError, UserError
from tests.conversion.models import Trained


def changed(checkpoint: Path, target: Path, key: str, change: float) -> Path:
    """Copy a checkpoint, adding ``change`` to the last element of one tensor."""
    reader = StateReader(checkpoint)
    target.mkdir()
    shutil.copy(checkpoint / "metadata.json", target)

    def read(name: str) -> torch.Tensor:
        tensor = reader.read(name)
        if name == key:
            tensor.view(-1)[-1] += change
        return tensor

    write_state_offline(reader.tensors, read, target)
    write_manifest(target, hash_files(target, files_below(target)))
    return target


def test_a_model_equals_its_export_and_its_copy(
    trained: dict[str, Trained], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained["dense"].checkpoint
    export_hf(checkpoint, tmp_path / "out", checks_logits=False)
    verify(checkpoint.parents[1], tmp_path / "out")
    assert "bitwise equal" in capsys.readouterr().out
    verify(checkpoint, changed(checkpoint, tmp_path / "same", "", 0.0), compares_logits=False)
    assert " moments: bitwise equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key",
    [
        "model.decoder.layers.1.mlp.linear_fc2.weight",
        "exp_avg_sq.decoder.layers.0.self_attention.mosa_heads.qkv_weight",
    ],
)
def test_a_single_changed_number_is_found(trained: dict[str, Trained], tmp_path: Path, key: str) -> None:
    checkpoint = trained["hybrid"].checkpoint
    other = changed(checkpoint, tmp_path / "other", key, 0.25)
    with pytest.raises(RunError, match=f"{key} differs most, by "):
        verify(checkpoint, other)
    with pytest.raises(RunError, match=f"{key} differs most, by "):
        verify(other, checkpoint, tolerance=1e-4, compares_logits=False)
    verify(checkpoint, other, tolerance=0.5, compares_logits=False)


def test_equal_weights_with_another_configuration_differ(trained: dict[str, Trained], tmp_path: Path) -> None:
    export_hf(trained["pure"].checkpoint, tmp_path / "out", checks_logits=False)
    (tmp_path / "out" / MANIFEST).unlink()
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sparsity": 2.0}))
    for tolerance in (0.0, 0.1):  # of weights, not of logits
        with pytest.raises(RunError, match=r"but their logits are not .* configurations: sparsity \(4.0 and 2.0\)$"):
            verify(trained["pure"].checkpoint, tmp_path / "out", tolerance=tolerance)


def test_models_that_cannot_be_compared(trained: dict[str, Trained], tmp_path: Path) -> None:
    checkpoint = trained["dense"].checkpoint
    with pytest.raises(RunError, match=r"the models differ: decoder\.final_layernorm\.bias is missing"):
        verify(checkpoint, trained["pure"].checkpoint)
    with pytest.raises(UserError, match=r"--tolerance must be at least 0 \(bitwise equality\), got -1"):
        verify(checkpoint, checkpoint, tolerance=-1)
    with pytest.raises(UserError, match="does not exist"):
        verify(checkpoint, tmp_path / "nothing")
    cut = changed(checkpoint, tmp_path / "cut", "", 0.0)
    file = next((cut / "state").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=rf"'{cut}' is damaged: state/{file.name} has "):
        verify(checkpoint, cut)


def test_the_command(trained: dict[str, Trained]) -> None:
    checkpoint = str(trained["local"].checkpoint)
    done = CliRunner().invoke(app, ["checkpoint", "verify", checkpoint, checkpoint, "--no-logits"])
    assert done.exit_code == 0 and "bitwise equal" in done.output
