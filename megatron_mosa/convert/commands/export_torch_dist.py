"""Export a dense model to a checkpoint in Megatron-LM's ``torch_dist`` format."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from megatron_mosa.checkpoint import TensorInfo, damage_as_run_error, read_metadata, write_state_offline
from megatron_mosa.convert.formats.megatron_args import to_megatron_args
from megatron_mosa.convert.formats.mosa import CheckpointReader
from megatron_mosa.convert.formats.torch_dist import FORMAT
from megatron_mosa.convert.locate import COMMON_FILE, TRACKER, Kind, find_model_of
from megatron_mosa.convert.target import atomic_folder, check_target
from megatron_mosa.convert.weights import Weight, num_parameters, stacked

_COMMON_FORMAT = {"common_backend": "torch", "common_backend_version": 1}  # required by Megatron-core before 0.19
_LINEAR = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


def export_torch_dist(path: Path, target: Path, *, force: bool = False) -> None:
    """Write a checkpoint for Megatron-LM's ``--load`` (iteration 0, no optimizer state), one layer's tensor at a time.

    Args:
        path: a checkpoint, or a run directory (its newest checkpoint), of a model with only dense heads.
        target: the folder to create.
        force: replace an existing model at ``target``.

    Raises:
        UserError: the checkpoint does not exist, has heads that Megatron-LM does not support, or the target exists.
        RunError: the checkpoint is damaged; no files are left behind.
        StorageError: writing the target failed.
    """
    folder = find_model_of(Kind.MOSA, path)
    check_target(target, folder, force=force)
    with damage_as_run_error(folder):
        source = CheckpointReader.open(folder, read_metadata(folder))
        args = to_megatron_args(source.config, source.vocab_rows)
        with atomic_folder(target, force=force) as writing:
            iteration = writing / "iter_0000000"
            iteration.mkdir()
            _write_weights(source, iteration)
            common = BytesIO()
            torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 0}, common)
            (iteration / COMMON_FILE).write_bytes(common.getvalue())
            (iteration / "metadata.json").write_text(json.dumps(FORMAT | _COMMON_FORMAT), encoding="utf-8")
            (writing / TRACKER).write_text("0", encoding="utf-8")
    parameters = num_parameters(source.weights)
    print(f"{target}: exported {parameters:,} parameters in fp32; load them in Megatron-LM: --load {target} --finetune")


def _write_weights(source: CheckpointReader, iteration: Path) -> None:
    from megatron_mosa.utils import progress

    layers = source.config.model.num_layers
    rows: dict[str, dict[int | None, Weight]] = {}  # key -> layer -> weight
    for weight in source.weights:
        key, layer = stacked(weight.megatron_names()[0])
        rows.setdefault(key, {})[layer] = weight
    infos = {}
    for key, weights in rows.items():
        shape = next(iter(weights.values())).module_shape
        infos[key] = TensorInfo(shape if None in weights else (layers, *shape), torch.float32)
    # Megatron's linear modules and Transformer Engine's norm have an extra state, which is empty without FP8 but
    # required for loading.
    names = [f"layers.{name}._extra_state/shard_{layer}_{layers}" for name in _LINEAR for layer in range(layers)]
    extra_states = {f"decoder.{name}": [None] for name in [*names, "final_layernorm._extra_state/shard_0_1"]}
    with progress(sum(4 * info.elements for info in infos.values()), "exporting") as bar:

        def read(key: str, layer: int | None = None) -> Tensor:
            weight = rows[key][layer]
            tensor = weight.for_module(source.read(weight.name))
            bar.update(tensor.nbytes)
            return tensor if layer is None else tensor[None]

        cuts = {key: (0, layers) for key, weights in rows.items() if None not in weights}
        write_state_offline(infos, read, iteration, cuts, below="", read_part=read, objects=extra_states)
