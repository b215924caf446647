"""A GPT in Megatron-LM's ``torch_dist`` format, opened: torch's distributed checkpoint, with arguments beside it.

A folder ``iter_0000100`` has the index (``.metadata``) and files (``__0_0.distcp``, ...) of torch's, ``metadata.json``
with the format's version, and ``common.pt`` with what is no tensor: ``args``, ``iteration`` and more. (Megatron-core
0.19 keeps that in the files of torch's, too.) Beside it ``latest_checkpointed_iteration.txt`` names the newest. Keys of
weights are those of ``GPTModel.sharded_state_dict``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from megatron_mosa.checkpoint.locate import torch_dist_iteration
from megatron_mosa.checkpoint.manifest import DamagedError
from megatron_mosa.checkpoint.megatron_args import from_megatron_args
from megatron_mosa.checkpoint.offline import StateReader
from megatron_mosa.checkpoint.safetensors_folder import read_json
from megatron_mosa.checkpoint.saved_objects import load_saved
from megatron_mosa.checkpoint.weights import Weight, model_weights, partition_keys, stacked
from megatron_mosa.config import Config
from megatron_mosa.errors import UserError

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
COMMON_FILE = "common.pt"
_COMMON_KEY = "common_state/shard_0_1"
_HARMLESS = (
    "_io.BytesIO",
    "megatron.",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "signal.Signals",
    "types.SimpleNamespace",
)
_EXACT = (torch.float32, torch.bfloat16, torch.float16)  # what fp32 holds without rounding


@dataclass(frozen=True)
class Place:
    """Where a weight lies."""

    keys: tuple[str, ...]
    """One, or those of its matrices."""

    row: int | None
    """Of a tensor of all layers [L, ...]; None: it has a tensor of its own."""


@dataclass(frozen=True)
class TorchDistModel:
    """A checkpoint of Megatron-LM's; implements ``Opened``."""

    path: Path
    config: Config
    vocab_rows: int
    weights: list[Weight]
    state: StateReader
    places: dict[str, Place]

    @classmethod
    def open(cls, folder: Path) -> TorchDistModel:
        """Read all that says what the model is, and its tensors once for their checksums.

        Raises:
            UserError: a model that has no counterpart here; tensors that are missing, left over or of another shape.
            DamagedError: a file is missing, damaged, or would run code.
        """
        iteration = cast(Path, torch_dist_iteration(folder))
        _refuse_format(iteration)
        state = StateReader(iteration, "")
        args = _read_args(iteration, state)
        embedding = state.tensors.get("embedding.word_embeddings.weight")
        if embedding is None:
            raise UserError(f"'{folder}' has no embedding.word_embeddings.weight; expected a GPT of Megatron-LM's")
        rows = embedding.shape[0]
        config = from_megatron_args(args, rows)
        weights = model_weights(config, rows)
        places = {weight.name: _place(weight, config.model.num_layers, state, folder) for weight in weights}
        keys = [key for place in places.values() for key in place.keys]
        if left := sorted(set(partition_keys(state.tensors)[0]) - set(keys)):
            raise UserError(
                f"'{folder}': {left[0]} has no counterpart here; expected weights of dense GPT layers, no biases"
            )
        _refuse_changes(state, set(keys))
        return cls(folder, config, rows, weights, state, places)

    def read(self, name: str) -> Tensor:
        """As Opened."""
        weight = next(weight for weight in self.weights if weight.name == name)
        place = self.places[name]
        parts = [self.state.read(key, place.row).float() for key in place.keys]
        return weight.from_module(parts[0]) if len(parts) == 1 else weight.fusion.join(parts)


def _refuse_format(iteration: Path) -> None:
    content = read_json(iteration / "metadata.json")
    for key, allowed in FORMAT.items():
        if content.get(key) != allowed:
            raise UserError(
                f"'{iteration}': metadata.json has {key}={content.get(key)}; expected {allowed}; save it with "
                "--ckpt-format torch_dist, or update megatron_mosa"
            )


def _read_args(iteration: Path, state: StateReader) -> Namespace:
    content = state.read_bytes(_COMMON_KEY)
    if content is None or (iteration / COMMON_FILE).is_file():
        common = load_saved(iteration / COMMON_FILE, COMMON_FILE, _HARMLESS, (Namespace,))
    else:
        found = load_saved(BytesIO(content), _COMMON_KEY, _HARMLESS, (Namespace,))
        common = found[0] if isinstance(found, list) and found else found
    args = common.get("args") if isinstance(common, dict) else None
    if not isinstance(args, Namespace):
        raise UserError(
            f"'{iteration}' holds no args, which describe the model; expected what Megatron-LM itself saved"
        )
    return args


def _place(weight: Weight, num_layers: int, state: StateReader, folder: Path) -> Place:
    """Where a weight lies, whichever of the ways there are it was written in."""
    shapes = {key: info.shape for key, info in state.tensors.items()}
    for place in _places(weight):
        if not all(key in shapes for key in place.keys):
            continue
        expected = (weight.module_shape,) if len(place.keys) == 1 else weight.part_shapes()
        for key, shape in zip(place.keys, expected, strict=True):
            whole = shape if place.row is None else (num_layers, *shape)
            if shapes[key] != whole:
                raise UserError(
                    f"'{folder}' is not the model that its args describe: {key} is {shapes[key]}, expected {whole}"
                )
            if (dtype := state.tensors[key].dtype) not in _EXACT:
                raise UserError(f"'{folder}': {key} is {dtype}; expected {', '.join(map(str, _EXACT))} (exact in fp32)")
        return place
    raise UserError(f"'{folder}' is not the model that its args describe: {weight.megatron_names()[0]} is missing")


def _places(weight: Weight) -> Iterator[Place]:
    for name in weight.megatron_names():
        whole, layer = stacked(name)
        if layer is not None:
            yield Place((whole,), layer)
        yield Place((name,), None)
        if len(weight.parts) == 2:  # a gated MLP, whose halves may lie apart
            yield Place((f"{name}_w", f"{name}_v"), None)


def _refuse_changes(state: StateReader, keys: set[str]) -> None:
    from megatron_mosa.data.shards import progress

    total = sum(state.tensors[key].elements * state.tensors[key].dtype.itemsize for key in keys)
    with progress(total, "comparing checksums") as bar:
        if change := state.find_change(keys, bar.update):
            raise DamagedError(change)
