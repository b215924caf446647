"""Read Hugging Face folders: exported models and Llama models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mosa.checkpoint import MANIFEST, DamagedError, find_damage, is_recorded
from megatron_mosa.config import Config
from megatron_mosa.convert.formats.safetensors import SafetensorsFolder, read_json, shard_names
from megatron_mosa.convert.model_config import from_transformers
from megatron_mosa.convert.weights import Weight, model_weights
from megatron_mosa.errors import UserError
from megatron_mosa.utils import first_line, known_values

_EXACT = ("F32", "BF16", "F16")  # dtypes that convert to fp32 without rounding


@dataclass(frozen=True)
class HuggingFaceReader:
    """An exported model or a Llama in a Hugging Face folder; implements ``ModelReader``."""

    path: Path
    config: Config
    vocab_rows: int
    weights: list[Weight]
    tensors: SafetensorsFolder

    @classmethod
    def open(cls, folder: Path) -> HuggingFaceReader:
        """Read the model's description, verify files against the manifest if there is one, and check tensor shapes.

        Raises:
            UserError: the model is not supported, or tensors are missing, unexpected or of another shape.
            DamagedError: a file is missing, damaged, or changed since the export.
        """
        content = read_json(folder / "config.json")
        config, vocab_rows = from_transformers(content)
        weights = [_named_as_in(content, weight) for weight in model_weights(config, vocab_rows)]
        has_manifest = is_recorded(folder, shard_names(folder))
        if has_manifest and (damage := find_damage(folder, reads_all=True)):
            raise DamagedError(f"{damage} (if the change is intentional, remove {MANIFEST})")
        tensors = SafetensorsFolder(folder)
        _compare(tensors, weights, folder)
        return cls(folder, config, vocab_rows, weights, tensors)

    def read(self, name: str) -> Tensor:
        """Read the weight of this global name in fp32, joined from the tensors that hold it."""
        weight = next(weight for weight in self.weights if weight.name == name)
        return weight.fusion.join([self.tensors.read(part).float() for part in weight.parts or weight.derived_from])


def check_hugging_face(folder: Path) -> None:
    """Check that config.json describes a model of ours with the weights that are there, by their headers.

    Raises:
        UserError: a value is not allowed, or tensors are missing, unexpected or of another shape.
        DamagedError: a file is missing or damaged.
    """
    from megatron_mosa.hf.configuration_mosa import MosaConfig  # imports transformers

    content = read_json(folder / "config.json")
    try:
        given = known_values(MosaConfig.__init__, content)
        config, vocab_rows = from_transformers(MosaConfig(**given).to_dict())  # with its defaults
        _check_tokens(content, vocab_rows)
    except (ValueError, TypeError) as error:
        raise DamagedError(f"config.json: {first_line(error)}") from None
    _compare(SafetensorsFolder(folder), model_weights(config, vocab_rows), folder)


def _check_tokens(content: dict[str, Any], vocab_rows: int) -> None:
    """Raise a ValueError unless the special tokens are tokens; an end may be one of several."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(name)
        tokens = value if isinstance(value, list) and name.startswith("eos") else [] if value is None else [value]
        if not all(type(token) is int and 0 <= token < vocab_rows for token in tokens):
            raise ValueError(f"{name} must be a token from 0 to {vocab_rows - 1}, got {value!r}")


def _named_as_in(content: dict[str, Any], weight: Weight) -> Weight:
    """Drop ``dense_heads.`` from a Llama's tensor names: it has only one kind of heads."""
    if content["model_type"] != "llama":
        return weight
    parts = tuple(part.replace("self_attn.dense_heads.", "self_attn.") for part in weight.parts)
    return Weight(weight.name, weight.shape, parts, weight.fusion)


def _compare(tensors: SafetensorsFolder, weights: list[Weight], folder: Path) -> None:
    expected = {
        part: shape for weight in weights for part, shape in zip(weight.parts, weight.part_shapes(), strict=True)
    }
    found = {key: info.shape for key, info in tensors.tensors.items() if not key.endswith("rotary_emb.inv_freq")}
    if "embed_tokens.weight" in found:  # without the prefix "model."
        raise UserError(
            f"'{folder}' holds only the base model, without lm_head, as AutoModel saves it; save AutoModelForCausalLM "
            "instead"
        )
    if "lm_head.weight" not in expected and found.pop("lm_head.weight", None) is not None:
        _compare_tied(tensors, folder)
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != expected.get(key):
            raise UserError(
                f"'{folder}' does not match the model described in its config.json: {key} is "
                f"{found.get(key, 'missing')}, expected {expected.get(key, 'none')}"
            )
        if (dtype := tensors.tensors[key].dtype) not in _EXACT:
            raise UserError(f"'{folder}': {key} has dtype {dtype}, but must be {', '.join(_EXACT)} (exact in fp32)")


def _compare_tied(tensors: SafetensorsFolder, folder: Path) -> None:
    """Accept a stored copy of the tied output embedding; transformers would not tie one that differs."""
    names = "lm_head.weight", "model.embed_tokens.weight"
    if names[1] in tensors.tensors and not torch.equal(*map(tensors.read, names)):
        raise UserError(
            f"'{folder}' does not match the model described in its config.json: tie_word_embeddings is true, but "
            f"{names[0]} differs from {names[1]}; set tie_word_embeddings to false in config.json to keep both"
        )
