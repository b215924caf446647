"""Add freshly initialized MoSA heads to a model without any, to start a hybrid from a dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from megatron_mosa.config import Config, config_from_dict, config_to_dict
from megatron_mosa.convert.logits import single_process_groups
from megatron_mosa.convert.model_reader import ModelReader
from megatron_mosa.convert.weights import Weight, model_weights
from megatron_mosa.errors import UserError

if TYPE_CHECKING:
    from megatron_mosa.attention import PartitionedHeads


@dataclass(frozen=True)
class ModelWithAddedHeads:
    """A model plus fresh MoSA heads in each layer; their output projections are zero, so its outputs do not change.

    Routers and W_QKV are drawn by name, exactly as in a run with the same seed. The first optimizer step moves the
    output projections away from zero; from then on all parameters of the heads receive gradients.
    """

    model: ModelReader
    config: Config
    weights: list[Weight]
    initializers: dict[str, Callable[..., object]]
    """Initializers, keyed by the last component of a weight's name."""

    @classmethod
    def of(cls, model: ModelReader, heads: int, sparsity: float) -> ModelWithAddedHeads:
        """Add ``heads`` MoSA heads of the given sparsity to each layer.

        Raises:
            UserError: the model already has MoSA heads, or the number of heads or the sparsity is out of range.
        """
        if model.config.mosa.num_heads:
            raise UserError(f"--add-mosa-heads={heads}: '{model.path}' already has MoSA heads; omit the option")
        from megatron_mosa.model import build_empty_model

        mosa = replace(model.config.mosa, num_heads=heads, sparsity=sparsity)
        config = config_from_dict(config_to_dict(replace(model.config, mosa=mosa)))  # checks it
        one_layer = replace(config, model=replace(config.model, num_layers=1))
        with single_process_groups(one_layer):
            modules = dict(build_empty_model(one_layer, model.vocab_rows).named_modules())
        initializers = cast("PartitionedHeads", modules["decoder.layers.0.self_attention.mosa_heads"]).initializers
        return cls(model, config, model_weights(config, model.vocab_rows), initializers)

    @property
    def path(self) -> Path:
        """The folder of the original model."""
        return self.model.path

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        return self.model.vocab_rows

    def read(self, name: str) -> Tensor:
        """Read a weight of the original model, or initialize one of the added heads; see ``ModelReader.read``."""
        from megatron_mosa.model import draw

        if ".mosa_heads." not in name:
            return self.model.read(name)
        shape = next(weight.shape for weight in self.weights if weight.name == name)
        if name.endswith((".proj_weight", ".thresholds", ".threshold_updates", ".head_bias")):
            return torch.zeros(shape)
        return draw(self.config.run.seed, name, shape, self.initializers[name.rpartition(".")[2]])
