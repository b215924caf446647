"""A model opened for reading, whoever wrote it: what it is, and its weights one at a time, in our names and layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_mosa.checkpoint.format import Metadata, read_metadata
from megatron_mosa.checkpoint.locate import Kind, find_model
from megatron_mosa.checkpoint.manifest import MANIFEST, DamagedError, find_damage, is_recorded
from megatron_mosa.checkpoint.model_config import from_transformers, model_config
from megatron_mosa.checkpoint.offline import StateReader
from megatron_mosa.checkpoint.safetensors_folder import SafetensorsFolder, read_json, shard_names
from megatron_mosa.checkpoint.torch_dist import TorchDistModel
from megatron_mosa.checkpoint.weights import Weight, model_weights
from megatron_mosa.config import Config
from megatron_mosa.errors import UserError

_EXACT = ("F32", "BF16", "F16")  # what fp32 holds without rounding


class Opened(Protocol):
    """What conversions need of a model."""

    @property
    def path(self) -> Path:
        """Its folder."""
        ...

    @property
    def config(self) -> Config:
        """Of the model alone."""
        ...

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        ...

    @property
    def weights(self) -> list[Weight]:
        """All of them, embedding first."""
        ...

    def read(self, name: str) -> Tensor:
        """The weight of that name of ours, in fp32 and in the shape that a checkpoint has it in."""
        ...


def open_model(path: Path) -> Opened:
    """A checkpoint of ours (of a run directory the newest) or of Megatron-LM's, or a Hugging Face folder.

    Raises:
        UserError: there is none, or it is not what it says of itself.
        DamagedError: a file is missing or is another one.
    """
    folder, kind = find_model(path)
    if kind is Kind.OURS:
        return Source.open(folder, read_metadata(folder))
    if kind is Kind.HUGGING_FACE:
        return HuggingFaceModel.open(folder)
    if kind is Kind.TORCH_DIST:
        return TorchDistModel.open(folder)
    allowed = f"a {Kind.OURS.value}, a run directory, a {Kind.HUGGING_FACE.value}, or a {Kind.TORCH_DIST.value}"
    raise UserError(f"'{path}' is a {kind.value}; expected {allowed}")


@dataclass(frozen=True)
class Source:
    """A checkpoint of ours, opened."""

    path: Path
    metadata: Metadata
    config: Config
    state: StateReader
    weights: list[Weight]
    vocab_rows: int

    @classmethod
    def open(cls, folder: Path, metadata: Metadata) -> Source:
        """Read all that says what the model is, none of the tensors; see that they are what was written.

        Raises:
            DamagedError: a file is missing or is another one.
            UserError: the weights are not those of the model that the checkpoint describes.
        """
        if metadata.has_manifest:
            print(f"{folder}: comparing all files with the manifest", flush=True)
            if damage := find_damage(folder, reads_all=True):
                raise DamagedError(damage)
        state, config = StateReader(folder), model_config(metadata.config)
        embedding = state.weights.get("embedding.word_embeddings.weight")
        rows = embedding.shape[0] if embedding else 0
        weights = model_weights(config, rows)
        found, expected = {name: info.shape for name, info in state.weights.items()}, {w.name: w.shape for w in weights}
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                raise UserError(
                    f"'{folder}' is not the model that its metadata.json describes: {name} is "
                    f"{found.get(name, 'missing')}, expected {expected.get(name, 'none')}; nothing can be exported"
                )
        return cls(folder, metadata, config, state, weights, rows)

    def read(self, name: str) -> Tensor:
        """The fp32 master weight of that name."""
        return self.state.read(f"model.{name}")


@dataclass(frozen=True)
class HuggingFaceModel:
    """An exported model, or a Llama, opened."""

    path: Path
    config: Config
    vocab_rows: int
    weights: list[Weight]
    tensors: SafetensorsFolder

    @classmethod
    def open(cls, folder: Path) -> HuggingFaceModel:
        """Read all that says what the model is, none of the tensors; see that they are its.

        Raises:
            UserError: a model that has no counterpart here; tensors that are missing, left over or of another shape.
            DamagedError: a file is missing, damaged or not what was exported.
        """
        content = read_json(folder / "config.json")
        config, vocab_rows = from_transformers(content)
        weights = [_named_as_in(content, weight) for weight in model_weights(config, vocab_rows)]
        has_manifest = is_recorded(folder, shard_names(folder))
        if has_manifest and (damage := find_damage(folder, reads_all=True)):
            raise DamagedError(f"{damage} (if the change is meant, remove {MANIFEST})")
        tensors = SafetensorsFolder(folder)
        _compare(tensors, weights, folder)
        return cls(folder, config, vocab_rows, weights, tensors)

    def read(self, name: str) -> Tensor:
        """As Opened."""
        weight = next(weight for weight in self.weights if weight.name == name)
        return weight.fusion.join([self.tensors.read(part).float() for part in weight.parts])


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
    if "lm_head.weight" not in expected and found.pop("lm_head.weight", None) is not None:
        _compare_tied(tensors, folder)
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise UserError(
                f"'{folder}' is not the model that its config.json describes: {key} is {found.get(key, 'missing')}, "
                f"expected {expected.get(key, 'none')}"
            )
        if (dtype := tensors.tensors[key].dtype) not in _EXACT:
            raise UserError(f"'{folder}': {key} is {dtype}; expected {', '.join(_EXACT)} (exact in fp32)")


def _compare_tied(tensors: SafetensorsFolder, folder: Path) -> None:
    """The output embedding may be there, though it is the embedding once more; transformers would not tie another."""
    names = "lm_head.weight", "model.embed_tokens.weight"
    if names[1] in tensors.tensors and not torch.equal(*map(tensors.read, names)):
        raise UserError(
            f"'{folder}' is not the model that its config.json describes: tie_word_embeddings is true, but {names[0]} "
            f"is not {names[1]}; set tie_word_embeddings to false in config.json to keep both"
        )
