"""Rewrite a checkpoint with the shards of another tensor-parallel size, with or without optimizer state.

Changing the layout of a run does not require this: any layout reads any checkpoint. But after resharding each rank
reads its own files, and a checkpoint without optimizer state has a third of the size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_mosa.checkpoint import (
    METADATA,
    damage_as_run_error,
    hash_files,
    read_metadata,
    write_manifest,
    write_metadata,
    write_state_offline,
)
from megatron_mosa.config import Config, config_from_dict, config_to_dict
from megatron_mosa.convert.formats.mosa import CheckpointReader
from megatron_mosa.convert.locate import Kind, find_model_of
from megatron_mosa.convert.logits import single_process_groups
from megatron_mosa.convert.target import atomic_folder, check_target
from megatron_mosa.errors import UserError
from megatron_mosa.utils import counted


def reshard(
    path: Path, target: Path, *, tensor_parallel: int | None = None, drop_optimizer: bool = False, force: bool = False
) -> None:
    """Rewrite a checkpoint, one tensor at a time.

    Args:
        path: a checkpoint, or a run directory (its newest checkpoint).
        target: the folder to create.
        tensor_parallel: tensor-parallel size to shard for; None: the size that wrote the checkpoint.
        drop_optimizer: omit Adam's moments; runs can start from the result (``checkpoint.initialize_from``), but not
            resume from it.
        force: replace an existing model at ``target``.

    Raises:
        UserError: the checkpoint does not exist, the model cannot be sharded for this size, or the target exists.
        RunError: the checkpoint is damaged.
        StorageError: writing the target failed.
    """
    folder = find_model_of(Kind.MOSA, path)
    check_target(target, folder, force=force)
    with damage_as_run_error(folder):
        metadata = read_metadata(folder)
        size = tensor_parallel or metadata.layout.get("tensor_parallel_size", 1)
        source = CheckpointReader.open(folder, metadata)
        dims = _split_dims(source, size)
        _write(source, target, size, dims, drop_optimizer, force)


def _split_dims(source: CheckpointReader, size: int) -> dict[str, int]:
    """Return the dimension along which each sharded weight is split, by name.

    Raises:
        UserError: the size does not divide a split dimension; the message lists the sizes that do.
    """
    from megatron_mosa.model import build_empty_model, stored_tensors

    _check_size(source.config, size)
    one_layer = replace(source.config, model=replace(source.config.model, num_layers=1))
    with single_process_groups(one_layer):
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


def _check_size(config: Config, size: int) -> None:
    tree = config_to_dict(config)
    tree["parallel"]["tensor_model_parallel_size"] = size
    try:
        config_from_dict(tree)
    except UserError as error:
        raise UserError(f"--tensor-parallel={size}: {error}") from None


def _write(
    source: CheckpointReader, target: Path, size: int, dims: dict[str, int], drop_optimizer: bool, force: bool
) -> None:
    from megatron_mosa.utils import progress

    tensors = {k: info for k, info in source.state.tensors.items() if k.startswith("model.") or not drop_optimizer}
    cuts = {key: (dims[name], size) for key in tensors if size > 1 and (name := key.partition(".")[2]) in dims}
    with atomic_folder(target, force=force) as writing:
        with progress(sum(4 * info.elements for info in tensors.values()), "rewriting") as bar:

            def read(key: str) -> Tensor:
                tensor = source.state.read(key)
                bar.update(tensor.nbytes)
                return tensor

            records = write_state_offline(tensors, read, writing, cuts)
        layout = {"tensor_parallel_size": size, "data_parallel_size": 1}
        write_metadata(replace(source.metadata, layout=layout), writing)
        write_manifest(writing, records | hash_files(writing, [METADATA]))
    content = "weights without optimizer state" if drop_optimizer else counted(len(tensors), "tensor")
    print(f"{target}: wrote {content}, sharded for tensor-parallel size {size}")
