"""A Hugging Face folder as a checkpoint of ours: its weights, without optimizer state."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mosa import __version__
from megatron_mosa.checkpoint.format import Metadata, write_metadata
from megatron_mosa.checkpoint.locate import Kind, find_model, publishing, refuse_target
from megatron_mosa.checkpoint.manifest import (
    MANIFEST,
    DamagedError,
    digests,
    files_below,
    find_damage,
    naming_damage,
    write_manifest,
)
from megatron_mosa.checkpoint.model_config import from_transformers
from megatron_mosa.checkpoint.offline import TensorInfo, write_state_offline
from megatron_mosa.checkpoint.safetensors_folder import SafetensorsFolder, read_json
from megatron_mosa.checkpoint.weights import Weight, model_weights
from megatron_mosa.config import Config, config_to_dict
from megatron_mosa.errors import UserError

_EXACT = ("F32", "BF16", "F16")  # what fp32 holds without rounding


def import_hf(path: Path, target: Path, *, force: bool = False) -> None:
    """Write the weights of an exported model, or of a Llama, as a checkpoint to start from; one tensor at a time.

    Args:
        path: a folder with config.json and safetensors.
        target: a folder that is not there.
        force: replace a model that lies at ``target``.

    Raises:
        UserError: no such folder, a model that has no counterpart here, tensors that are missing, left over or of
            another shape, a target that is taken.
        RunError: a damaged file, or one that the file system does not take.
    """
    folder, kind = find_model(path)
    if kind is not Kind.HUGGING_FACE:
        raise UserError(f"'{path}' is a {kind.value}; legal: a {Kind.HUGGING_FACE.value}")
    refuse_target(target, folder, force=force)
    with naming_damage(folder):
        _import(folder, target)


def _import(folder: Path, target: Path) -> None:
    content = read_json(folder / "config.json")
    config, vocab_rows = from_transformers(content)
    weights = [_named_as_in(content, weight) for weight in model_weights(config, vocab_rows)]
    if (folder / MANIFEST).is_file() and (damage := find_damage(folder, reads_all=True)):
        raise DamagedError(f"{damage} (if the change is meant, remove {MANIFEST})")
    tensors = SafetensorsFolder(folder)
    _compare(tensors, weights, folder)
    with publishing(target) as writing:
        _write(tensors, weights, writing)
        write_metadata(_metadata(config, vocab_rows, folder), writing)
        write_manifest(writing, digests(writing, files_below(writing)))
    parameters = sum(torch.Size(weight.shape).numel() for weight in weights)
    print(
        f"{target}: {parameters:,} parameters, no optimizer state; start a run from it with "
        f"checkpoint.initialize_from={target}"
    )


def _named_as_in(content: dict[str, Any], weight: Weight) -> Weight:
    """A Llama has heads of one kind, and names none."""
    if content["model_type"] != "llama":
        return weight
    parts = tuple(part.replace("self_attn.dense_heads.", "self_attn.") for part in weight.parts)
    return Weight(weight.name, weight.shape, parts, weight.fusion)


def _compare(tensors: SafetensorsFolder, weights: list[Weight], folder: Path) -> None:
    expected = {
        part: shape for weight in weights for part, shape in zip(weight.parts, weight.part_shapes(), strict=True)
    }
    found = {key: info.shape for key, info in tensors.tensors.items() if not key.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in expected:
        found.pop("lm_head.weight", None)  # the tied embedding once more
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise UserError(
                f"'{folder}' is not the model that its config.json describes: {key} is {found.get(key, 'missing')}, "
                f"expected {expected.get(key, 'none')}"
            )
        if (dtype := tensors.tensors[key].dtype) not in _EXACT:
            raise UserError(f"'{folder}': {key} is {dtype}; legal: {', '.join(_EXACT)} (exact in fp32)")


def _write(tensors: SafetensorsFolder, weights: list[Weight], writing: Path) -> None:
    from megatron_mosa.data.shards import progress

    by_key = {f"model.{weight.name}": weight for weight in weights}
    infos = {key: TensorInfo(weight.shape, torch.float32) for key, weight in by_key.items()}
    with progress(sum(4 * info.elements for info in infos.values()), "importing") as bar:

        def read(key: str) -> Tensor:
            weight = by_key[key]
            tensor = weight.fusion.join([tensors.read(part).float() for part in weight.parts])
            bar.update(tensor.nbytes)
            return tensor

        write_state_offline(infos, read, writing)


def _metadata(config: Config, vocab_rows: int, folder: Path) -> Metadata:
    from megatron_mosa.data import load_tokenizer, tokenizer_hash
    from megatron_mosa.data.tokenizer import TOKENIZER_FILE, vocabulary_size

    tokenizer = folder / TOKENIZER_FILE
    known = tokenizer.is_file()
    return Metadata(
        step=0,
        consumed_samples=0,
        optimizer_step=0,
        config=config_to_dict(config),
        data={
            "index_samples": None,
            "tokenizer_hash": tokenizer_hash(tokenizer) if known else None,
            "vocab_size": vocabulary_size(load_tokenizer(str(tokenizer))) if known else vocab_rows,
            "fingerprint": None,
        },
        versions={"megatron_mosa": __version__} | {name: version(name) for name in ("torch", "transformers")},
        layout={},
    )
