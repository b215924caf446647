"""Export an fp32 state dict with the module's own names from a megatron_mosa checkpoint or DeepSpeed ZeRO shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_mosa.checkpoint import TensorInfo, damage_as_run_error, read_metadata, write_manifest
from megatron_mosa.convert.formats.mosa import CheckpointReader
from megatron_mosa.convert.formats.safetensors import Piece, write_shards
from megatron_mosa.convert.formats.zero import ZeroReader
from megatron_mosa.convert.locate import Kind, deepspeed_tags, find_model
from megatron_mosa.convert.target import atomic_folder, check_target
from megatron_mosa.errors import UserError
from megatron_mosa.utils import counted


def export_state_dict(path: Path, target: Path, *, force: bool = False) -> None:
    """Write a folder of safetensors with an index, one tensor at a time.

    Names and shapes are those of the module's ``state_dict``. Floating-point tensors are fp32; parameters are the
    optimizer's fp32 master weights.

    Args:
        path: a megatron_mosa checkpoint, a run directory (its newest checkpoint), or a DeepSpeed checkpoint of ZeRO 1,
            2 or 3.
        target: the folder to create.
        force: replace an existing model at ``target``.

    Raises:
        UserError: the checkpoint does not exist or cannot be merged, or the target exists.
        RunError: the checkpoint is damaged; no files are left behind.
        StorageError: writing the target failed.
    """
    folder, kind = find_model(path)
    if deepspeed_tags(folder):  # transformers' Trainer leaves them next to a config.json
        kind = Kind.DEEPSPEED
    if kind not in (Kind.MOSA, Kind.DEEPSPEED):
        accepted = f"a {Kind.MOSA.value}, a run directory, or a {Kind.DEEPSPEED.value}"
        raise UserError(f"'{path}' is a {kind.value}; --to fp32 accepts {accepted}")
    check_target(target, folder, force=force)
    with damage_as_run_error(folder):
        if kind is Kind.MOSA:
            source = CheckpointReader.open(folder, read_metadata(folder))
            weights = {weight.name: weight for weight in source.weights}
            infos = {name: TensorInfo(weight.module_shape, torch.float32) for name, weight in weights.items()}
            _write(infos, lambda name: weights[name].for_module(source.read(name)), target, force)
        else:
            shards = ZeroReader(folder)
            _write(shards.tensors, shards.read, target, force)


def _write(infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], target: Path, force: bool) -> None:
    def piece(name: str, info: TensorInfo) -> Piece:
        return Piece(info.elements * info.dtype.itemsize, lambda: {name: read(name).contiguous()})

    with atomic_folder(target, force=force) as folder:
        records = write_shards([piece(name, info) for name, info in infos.items()], folder)
        write_manifest(folder, records)
    elements = sum(info.elements for info in infos.values())
    print(f"{target}: exported {counted(elements, 'element')} in {counted(len(infos), 'tensor')}")
