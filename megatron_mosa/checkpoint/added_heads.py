"""Fresh MoSA heads beside the heads of a model without any: where a hybrid starts from a dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from megatron_mosa.checkpoint.logits import one_process
from megatron_mosa.checkpoint.opened import Opened
from megatron_mosa.checkpoint.weights import Weight, model_weights
from megatron_mosa.config import Config, config_from_dict, config_to_dict
from megatron_mosa.errors import UserError

if TYPE_CHECKING:
    from megatron_mosa.attention.heads import PartitionedHeads


@dataclass(frozen=True)
class WithMosaHeads:
    """A model and fresh heads in each layer, whose output projection is zero: it computes what the model did.

    Routers and W_QKV are drawn as those of a run with the same seed, by name; the first step moves the projections, and
    then all of them learn.
    """

    model: Opened
    config: Config
    weights: list[Weight]
    initialisers: dict[str, Callable[[Tensor], object]]
    """By the last part of a weight's name."""

    @classmethod
    def of(cls, model: Opened, heads: int, sparsity: float) -> WithMosaHeads:
        """Add heads.

        Raises:
            UserError: the model has MoSA heads already, or the number or the sparsity is out of range.
        """
        if model.config.mosa.num_heads:
            raise UserError(f"--add-mosa-heads={heads}: '{model.path}' has MoSA heads; leave the option out")
        from megatron_mosa.model import build_empty_model

        mosa = replace(model.config.mosa, num_heads=heads, sparsity=sparsity)
        config = config_from_dict(config_to_dict(replace(model.config, mosa=mosa)))  # checks it
        one_layer = replace(config, model=replace(config.model, num_layers=1))
        with one_process(one_layer):
            modules = dict(build_empty_model(one_layer, model.vocab_rows).named_modules())
        initialisers = cast("PartitionedHeads", modules["decoder.layers.0.self_attention.mosa_heads"]).initialisers
        return cls(model, config, model_weights(config, model.vocab_rows), initialisers)

    @property
    def path(self) -> Path:
        """Of the model."""
        return self.model.path

    @property
    def vocab_rows(self) -> int:
        """Of the model."""
        return self.model.vocab_rows

    def read(self, name: str) -> Tensor:
        """As Opened."""
        from megatron_mosa.model.initialization import draw

        if ".mosa_heads." not in name:
            return self.model.read(name)
        shape = next(weight.shape for weight in self.weights if weight.name == name)
        if name.endswith((".proj_weight", ".thresholds", ".threshold_updates")):
            return torch.zeros(shape)
        return draw(self.config.run.seed, name, shape, self.initialisers[name.rpartition(".")[2]])
