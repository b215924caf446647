"""A dense model as a checkpoint that Megatron-LM loads, in its ``torch_dist`` format."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from megatron_mosa.checkpoint.format import read_metadata
from megatron_mosa.checkpoint.locate import TRACKER, Kind, find_model_of, publishing, refuse_target
from megatron_mosa.checkpoint.manifest import naming_damage
from megatron_mosa.checkpoint.megatron_args import to_megatron_args
from megatron_mosa.checkpoint.offline import TensorInfo
from megatron_mosa.checkpoint.offline_writer import write_state_offline
from megatron_mosa.checkpoint.opened import Source
from megatron_mosa.checkpoint.torch_dist import COMMON_FILE, FORMAT
from megatron_mosa.checkpoint.weights import Weight, stacked

_COMMON_FORMAT = {"common_backend": "torch", "common_backend_version": 1}  # what Megatron-core before 0.19 asks for
_LINEAR = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def export_torch_dist(path: Path, target: Path, *, force: bool = False) -> None:
    """Write what ``--load`` of Megatron-LM takes, iteration 0 without optimizer state; one layer's tensor at a time.

    Args:
        path: a checkpoint, or a run directory (its newest), of a model with dense heads alone.
        target: a folder that is not there.
        force: replace a model that lies at ``target``.

    Raises:
        UserError: no such checkpoint, heads that Megatron-LM does not have, a target that is taken.
        RunError: the checkpoint is damaged; nothing is left behind then.
        StorageError: the file system does not take it.
    """
    folder = find_model_of(Kind.OURS, path)
    refuse_target(target, folder, force=force)
    with naming_damage(folder):
        source = Source.open(folder, read_metadata(folder))
        args = to_megatron_args(source.config, source.vocab_rows)
        with publishing(target) as writing:
            iteration = writing / "iter_0000000"
            iteration.mkdir()
            _write_weights(source, iteration)
            common = BytesIO()
            torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 0}, common)
            (iteration / COMMON_FILE).write_bytes(common.getvalue())
            (iteration / "metadata.json").write_text(json.dumps(FORMAT | _COMMON_FORMAT), encoding="utf-8")
            (writing / TRACKER).write_text("0", encoding="utf-8")
    parameters = sum(torch.Size(weight.shape).numel() for weight in source.weights)
    print(f"{target}: {parameters:,} parameters in fp32; load it in Megatron-LM with --load {target} --finetune")


def _write_weights(source: Source, iteration: Path) -> None:
    from megatron_mosa.data.shards import progress

    layers = source.config.model.num_layers
    rows: dict[str, dict[int | None, Weight]] = {}  # of each key, by layer
    for weight in source.weights:
        key, layer = stacked(weight.megatron_names()[0])
        rows.setdefault(key, {})[layer] = weight
    infos = {}
    for key, weights in rows.items():
        shape = next(iter(weights.values())).module_shape
        infos[key] = TensorInfo(shape if None in weights else (layers, *shape), torch.float32)
    # Megatron's linear modules, and Transformer Engine's norm, keep a state of their own, which is empty without FP8;
    # loading asks for it.
    places = [f"layers.{name}._extra_state/shard_{layer}_{layers}" for name in _LINEAR for layer in range(layers)]
    states = {f"decoder.{place}": [None] for place in [*places, "final_layernorm._extra_state/shard_0_1"]}
    with progress(sum(4 * info.elements for info in infos.values()), "exporting") as bar:

        def read(key: str, layer: int | None = None) -> Tensor:
            weight = rows[key][layer]
            tensor = weight.for_module(source.read(weight.name))
            bar.update(tensor.nbytes)
            return tensor if layer is None else tensor[None]

        cuts = {key: (0, layers) for key, weights in rows.items() if None not in weights}
        write_state_offline(infos, read, iteration, cuts, below="", read_part=read, objects=states)
