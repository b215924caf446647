"""``mosa checkpoint reshard`` writes the same tensors with the shards of another tensor-parallel size."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from typer.testing import CliRunner

from megatron_mosa.checkpoint import read_metadata
from megatron_mosa.checkpoint.manifest import find_damage
from megatron_mosa.checkpoint.reader import StateReader
from megatron_mosa.cli import app
from megatron_mosa.convert.commands.reshard import reshard
from megatron_mosa.convert.commands.verify import verify
from megatron_mosa.errors import UserError
from tests.conversion.models import Trained


def shards(checkpoint: Path) -> dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Return offsets and sizes of each tensor's shards."""
    index = pickle.loads((checkpoint / "state" / ".metadata").read_bytes())
    return {
        key: [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
        for key, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def test_tensors_are_unchanged_and_split_at_rank_boundaries(trained: dict[str, Trained], tmp_path: Path) -> None:
    checkpoint = trained["hybrid"].checkpoint
    done = CliRunner().invoke(
        app, ["checkpoint", "reshard", str(checkpoint), str(tmp_path / "two"), "--tensor-parallel", "2"]
    )
    assert done.exit_code == 0 and "sharded for tensor-parallel size 2" in done.output
    assert find_damage(tmp_path / "two", reads_all=True) is None
    before, after = StateReader(checkpoint), StateReader(tmp_path / "two")
    assert after.tensors == before.tensors and after.has_optimizer_state
    for key in before.tensors:
        assert torch.equal(before.read(key), after.read(key)), key
    found = shards(tmp_path / "two")
    layer, rows = "decoder.layers.1.", 4 * 24  # in each half of the gated MLP
    assert found[f"model.{layer}mlp.linear_fc1.weight"] == [
        ((0, 0, 0), (2, rows // 2, 24)),
        ((0, rows // 2, 0), (2, rows // 2, 24)),
    ]
    assert found[f"exp_avg.{layer}self_attention.mosa_heads.qkv_weight"] == [
        ((0, 0, 0), (3, 24, 24)),
        ((3, 0, 0), (3, 24, 24)),
    ]
    assert found[f"exp_avg_sq.{layer}mlp.linear_fc2.weight"] == [
        ((0, 0), (24, rows // 2)),
        ((0, rows // 2), (24, rows // 2)),
    ]
    assert found[f"model.{layer}input_layernorm.weight"] == [((0,), (24,))]
    metadata, original = read_metadata(tmp_path / "two"), read_metadata(checkpoint)
    assert metadata.layout["tensor_parallel_size"] == 2
    assert (metadata.step, metadata.consumed_samples, metadata.data) == (12, 192, original.data)
    reshard(tmp_path / "two", tmp_path / "one", tensor_parallel=1)
    assert shards(tmp_path / "one") == shards(checkpoint)


def test_centroids_are_split_over_heads(trained: dict[str, Trained], tmp_path: Path) -> None:
    checkpoint = trained["routing"].checkpoint
    reshard(checkpoint, tmp_path / "two", tensor_parallel=2)
    before, after = StateReader(checkpoint), StateReader(tmp_path / "two")
    key = "model.decoder.layers.1.self_attention.routing_heads.centroids"
    assert torch.equal(before.read(key), after.read(key))
    assert shards(tmp_path / "two")[key] == [((0, 0, 0), (2, 5, 8)), ((2, 0, 0), (2, 5, 8))]
    verify(checkpoint, tmp_path / "two")


def test_moments_can_be_dropped(trained: dict[str, Trained], tmp_path: Path) -> None:
    reshard(trained["pure"].checkpoint, tmp_path / "out", drop_optimizer=True)
    assert all(key.startswith("model.") for key in StateReader(tmp_path / "out").tensors)
    verify(trained["pure"].checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("hybrid", 4, r"--tensor-parallel=4: model\.num_dense_heads=2 is not divisible .* sizes .*\[1, 2\]"),
        ("pure", 4, r"--tensor-parallel=4: mosa\.num_heads=6 is not divisible"),
    ],
)
def test_sizes_that_do_not_divide_the_model(
    trained: dict[str, Trained], tmp_path: Path, kind: str, size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        reshard(trained[kind].checkpoint, tmp_path / "out", tensor_parallel=size)
    assert not list(tmp_path.iterdir())


def test_invalid_targets_and_sources_are_refused(trained: dict[str, Trained], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already exists; choose another folder"):
        reshard(trained["pure"].checkpoint, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        reshard(tmp_path / "nothing", tmp_path / "new")
