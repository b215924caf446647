"""Rewriting a checkpoint: cut as another tensor-parallel size would write it, with or without optimizer state.

No run needs it to change its layout: any layout reads any checkpoint. It makes each rank read files of its own, and
checkpoints of a third of the size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_mosa.checkpoint.format import METADATA, read_metadata, write_metadata
from megatron_mosa.checkpoint.locate import Kind, find_model_of, publishing, refuse_target
from megatron_mosa.checkpoint.logits import one_process
from megatron_mosa.checkpoint.manifest import digests, naming_damage, write_manifest
from megatron_mosa.checkpoint.offline_writer import write_state_offline
from megatron_mosa.checkpoint.opened import Source
from megatron_mosa.config import Config, config_from_dict, config_to_dict
from megatron_mosa.errors import UserError


def reshard(
    path: Path, target: Path, *, tensor_parallel: int | None = None, drop_optimizer: bool = False, force: bool = False
) -> None:
    """Write a checkpoint once more, one tensor at a time.

    Args:
        path: a checkpoint, or a run directory: its newest.
        target: a folder that is not there.
        tensor_parallel: the size to cut for; None: the one that wrote it.
        drop_optimizer: leave Adam's moments out: a model to start from (``checkpoint.initialize_from``), not to resume.
        force: replace a model that lies at ``target``.

    Raises:
        UserError: no such checkpoint, a size that the model cannot be cut for, a target that is taken.
        RunError: the checkpoint is damaged.
        StorageError: the file system does not take it.
    """
    folder = find_model_of(Kind.OURS, path)
    refuse_target(target, folder, force=force)
    with naming_damage(folder):
        metadata = read_metadata(folder)
        size = tensor_parallel or metadata.layout.get("tensor_parallel_size", 1)
        source = Source.open(folder, metadata)
        dims = _split_dims(source, size)
        _write(source, target, size, dims, drop_optimizer)


def _split_dims(source: Source, size: int) -> dict[str, int]:
    """The dimension that each split weight is cut along, by its name.

    Raises:
        UserError: the size does not divide what is split; names those that do.
    """
    from megatron_mosa.model import build_empty_model
    from megatron_mosa.model.state import stored_tensors

    _refuse_size(source.config, size)
    one_layer = replace(source.config, model=replace(source.config.model, num_layers=1))
    with one_process(one_layer):
        dims = {}
        for name, stored in stored_tensors(build_empty_model(one_layer, source.vocab_rows)).items():
            if (partition := stored.partition) is not None:
                dims[name] = partition.dim if partition.stride == 1 else partition.unfolded_dim
    first = "decoder.layers.0."
    for layer in range(1, source.config.model.num_layers):
        dims |= {
            name.replace(first, f"decoder.layers.{layer}."): dim for name, dim in dims.items() if name.startswith(first)
        }
    return dims


def _refuse_size(config: Config, size: int) -> None:
    tree = config_to_dict(config)
    tree["parallel"]["tensor_model_parallel_size"] = size
    try:
        config_from_dict(tree)
    except UserError as error:
        raise UserError(f"--tensor-parallel={size}: {error}") from None


def _write(source: Source, target: Path, size: int, dims: dict[str, int], drop_optimizer: bool) -> None:
    from megatron_mosa.data.shards import progress

    tensors = {k: info for k, info in source.state.tensors.items() if k.startswith("model.") or not drop_optimizer}
    cuts = {key: (dims[name], size) for key in tensors if size > 1 and (name := key.partition(".")[2]) in dims}
    with publishing(target) as writing:
        with progress(sum(4 * info.elements for info in tensors.values()), "rewriting") as bar:

            def read(key: str) -> Tensor:
                tensor = source.state.read(key)
                bar.update(tensor.nbytes)
                return tensor

            records = write_state_offline(tensors, read, writing, cuts)
        layout = {"tensor_parallel_size": size, "data_parallel_size": 1}
        write_metadata(replace(source.metadata, layout=layout), writing)
        write_manifest(writing, records | digests(writing, [METADATA]))
    what = "without optimizer state" if drop_optimizer else f"{len(tensors)} tensors"
    print(f"{target}: {what}, cut for tensor-parallel size {size}")
