"""Read checkpoints of this project: the model's configuration, and one weight at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_mosa.checkpoint import DamagedError, Metadata, StateReader, find_damage
from megatron_mosa.config import Config
from megatron_mosa.convert.model_config import model_config
from megatron_mosa.convert.weights import Weight, model_weights
from megatron_mosa.errors import UserError


@dataclass(frozen=True)
class CheckpointReader:
    """A megatron_mosa checkpoint; implements ``ModelReader``."""

    path: Path
    metadata: Metadata
    config: Config
    state: StateReader
    weights: list[Weight]
    vocab_rows: int

    @classmethod
    def open(cls, folder: Path, metadata: Metadata) -> CheckpointReader:
        """Read the model's description, verify all files against the manifest, and load no tensors.

        Raises:
            DamagedError: a file is missing or damaged.
            UserError: names or shapes of the weights do not match the model described in metadata.json.
        """
        if metadata.has_manifest:
            print(f"{folder}: verifying all files against the manifest", flush=True)
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
                    f"'{folder}' does not match the model described in its metadata.json: {name} is "
                    f"{found.get(name, 'missing')}, expected {expected.get(name, 'none')}; it cannot be exported"
                )
        return cls(folder, metadata, config, state, weights, rows)

    def read(self, name: str) -> Tensor:
        """Read the fp32 master weight of this name."""
        return self.state.read(f"model.{name}")
