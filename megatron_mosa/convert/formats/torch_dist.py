"""Read a GPT checkpoint in Megatron-LM's ``torch_dist`` format.

A folder ``iter_0000100`` contains a torch distributed checkpoint (index ``.metadata``, data ``__0_0.distcp``, ...),
``metadata.json`` with the version of the format, and ``common.pt`` with everything that is not a tensor: ``args``,
``iteration`` and more. (Megatron-core 0.19 also stores that in the distributed checkpoint.) Next to the folder,
``latest_checkpointed_iteration.txt`` names the newest iteration. Weight keys are those of
``GPTModel.sharded_state_dict``.
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

from megatron_mosa.checkpoint import DamagedError, StateReader
from megatron_mosa.config import Config
from megatron_mosa.convert.formats.megatron_args import from_megatron_args
from megatron_mosa.convert.formats.safe_load import safe_load
from megatron_mosa.convert.formats.safetensors import read_json
from megatron_mosa.convert.locate import COMMON_FILE, COMMON_KEY, partition_keys, torch_dist_iteration
from megatron_mosa.convert.weights import Weight, model_weights, stacked
from megatron_mosa.errors import UserError

FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
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
_EXACT = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that convert to fp32 without rounding


@dataclass(frozen=True)
class WeightLocation:
    """Where a weight is stored in the checkpoint."""

    keys: tuple[str, ...]
    """The key of its tensor, or the keys of its matrices if they are stored separately."""

    row: int | None
    """Index into a tensor that stacks all layers, [L, ...]; None: the weight has its own tensor."""


@dataclass(frozen=True)
class TorchDistReader:
    """A Megatron-LM checkpoint; implements ``ModelReader``."""

    path: Path
    config: Config
    vocab_rows: int
    weights: list[Weight]
    state: StateReader
    places: dict[str, WeightLocation]

    @classmethod
    def open(cls, folder: Path) -> TorchDistReader:
        """Read the model's description, and read its tensors once to verify their checksums.

        Raises:
            UserError: the model is not supported, or tensors are missing, unexpected or of another shape.
            DamagedError: a file is missing, damaged, or would run code.
        """
        iteration = cast(Path, torch_dist_iteration(folder))
        _check_format(iteration)
        state = StateReader(iteration, "")
        args = _read_args(iteration, state)
        embedding = state.tensors.get("embedding.word_embeddings.weight")
        if embedding is None:
            raise UserError(f"'{folder}' has no embedding.word_embeddings.weight; pass a Megatron-LM GPT checkpoint")
        rows = embedding.shape[0]
        config = from_megatron_args(args, rows)
        weights = model_weights(config, rows)
        places = {weight.name: _place(weight, config.model.num_layers, state, folder) for weight in weights}
        keys = [key for place in places.values() for key in place.keys]
        if unexpected := sorted(set(partition_keys(state.tensors)[0]) - set(keys)):
            raise UserError(
                f"'{folder}': {unexpected[0]} is not supported; only weights of dense GPT layers without biases can be "
                "imported"
            )
        _verify_checksums(state, set(keys))
        return cls(folder, config, rows, weights, state, places)

    def read(self, name: str) -> Tensor:
        """Read the weight of this global name, in fp32 and in checkpoint shape."""
        weight = next(weight for weight in self.weights if weight.name == name)
        place = self.places[name]
        parts = [self.state.read(key, place.row).float() for key in place.keys]
        return weight.from_module(parts[0]) if len(parts) == 1 else weight.fusion.join(parts)


def _check_format(iteration: Path) -> None:
    content = read_json(iteration / "metadata.json")
    for key, required in FORMAT.items():
        if content.get(key) != required:
            raise UserError(
                f"'{iteration}': {key} in metadata.json must be {required}, got {content.get(key)}; save the "
                "checkpoint with --ckpt-format torch_dist, or update megatron_mosa"
            )


def _read_args(iteration: Path, state: StateReader) -> Namespace:
    content = state.read_bytes(COMMON_KEY)
    if content is None or (iteration / COMMON_FILE).is_file():
        common = safe_load(iteration / COMMON_FILE, COMMON_FILE, _HARMLESS, (Namespace,))
    else:
        found = safe_load(BytesIO(content), COMMON_KEY, _HARMLESS, (Namespace,))
        common = found[0] if isinstance(found, list) and found else found
    args = common.get("args") if isinstance(common, dict) else None
    if not isinstance(args, Namespace):
        raise UserError(
            f"'{iteration}' does not contain args, which describe the model; pass a checkpoint that Megatron-LM saved"
        )
    return args


def _place(weight: Weight, num_layers: int, state: StateReader, folder: Path) -> WeightLocation:
    """Find where a weight is stored, whichever of the supported arrangements the checkpoint uses."""
    shapes = {key: info.shape for key, info in state.tensors.items()}
    for place in _candidate_places(weight):
        if not all(key in shapes for key in place.keys):
            continue
        expected = (weight.module_shape,) if len(place.keys) == 1 else weight.part_shapes()
        for key, shape in zip(place.keys, expected, strict=True):
            whole = shape if place.row is None else (num_layers, *shape)
            if shapes[key] != whole:
                raise UserError(
                    f"'{folder}' does not match the model that its args describe: {key} is {shapes[key]}, expected "
                    f"{whole}"
                )
            if (dtype := state.tensors[key].dtype) not in _EXACT:
                accepted = ", ".join(map(str, _EXACT))
                raise UserError(f"'{folder}': {key} has dtype {dtype}, but must be {accepted} (exact in fp32)")
        return place
    name = weight.megatron_names()[0]
    raise UserError(f"'{folder}' does not match the model that its args describe: {name} is missing")


def _candidate_places(weight: Weight) -> Iterator[WeightLocation]:
    for name in weight.megatron_names():
        whole, layer = stacked(name)
        if layer is not None:
            yield WeightLocation((whole,), layer)
        yield WeightLocation((name,), None)
        if len(weight.parts) == 2:  # a gated MLP, whose halves may be stored separately
            yield WeightLocation((f"{name}_w", f"{name}_v"), None)


def _verify_checksums(state: StateReader, keys: set[str]) -> None:
    from megatron_mosa.utils import progress

    total = sum(state.tensors[key].elements * state.tensors[key].dtype.itemsize for key in keys)
    with progress(total, "verifying checksums") as bar:
        if damage := state.find_corruption(keys, bar.update):
            raise DamagedError(damage)
