"""Describe names and layouts of weights in this project, transformers and Megatron-LM, for every conversion.

In transformers every projection has its own matrix; here some projections share a tensor. Heads and their weights are
those of ``attention.KINDS``. Weights of MoSA heads are the same on both sides: ``router_weight`` [E, h], ``qkv_weight``
[E, h, 3h'] with columns q, k, v, ``proj_weight`` [E, h', h], and ``thresholds`` or ``head_bias`` [E], by selection. So
are those of Routing heads: ``qv_weight`` [2 H h', h], ``proj_weight`` [h, H h'] and ``centroids`` [H, rho, h'].
Megatron-LM has only dense heads, laid out as here; it stacks all layers in one tensor [L, ...], or gives each layer its
own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_mosa.attention import KINDS
from megatron_mosa.config import Config
from megatron_mosa.parallel import Partition

CALIBRATED = 2.0**20  # number of updates recorded for imported or calibrated thresholds: longer than any warm-up
_THRESHOLDS, _UPDATES = ".mosa_heads.thresholds", ".mosa_heads.threshold_updates"
_GATED = Partition(dim=0, stride=2)  # how a module stores the two matrices of a gated MLP

# Our name parts -> Megatron-LM's. As in Transformer Engine, a norm belongs to the linear layer that follows it.
_LINEAR = {
    ".self_attention.dense_heads.qkv_weight": ".self_attention.linear_qkv.weight",
    ".self_attention.dense_heads.proj_weight": ".self_attention.linear_proj.weight",
}
_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
# Our weights of heads with Megatron's layout -> the initials of their projections in transformers.
_PROJECTIONS = {"qkv_weight": "qkv", "proj_weight": "o", "gate_weight": "g"}
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Fusion(Protocol):
    """How several matrices are stored in one tensor."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the matrices, as views where possible."""
        ...

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Invert ``split``."""
        ...


class SingleTensor:
    """A tensor that is the same on both sides."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor itself as the only part."""
        return (tensor,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the only part."""
        return parts[0]


SINGLE_TENSOR = SingleTensor()


class GateAndUp:
    """Gate and up matrices of a gated MLP in checkpoint layout, [2, n, h] (see ``Partition.unfold``)."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Split [2, n, h] into gate [n, h] and up [n, h]."""
        return tensor.unbind(0)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Stack gate [n, h] and up [n, h] to [2, n, h]."""
        return torch.stack(tuple(parts))


class Thresholds:
    """Thresholds that no update has set are NaN in transformers, see ``read_for_export``, and 0 here."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor itself as the only part."""
        return (tensor,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the only part, with 0 for NaN."""
        return parts[0].masked_fill(parts[0].isnan(), 0.0)


class ThresholdUpdates:
    """Numbers of updates have no counterpart in transformers; an import derives them from the thresholds."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return no parts: the tensor is not exported."""
        return ()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return 0 where the thresholds, the only part, are NaN: no update has set them."""
        return torch.full_like(parts[0], CALIBRATED).masked_fill(parts[0].isnan(), 0.0)


@dataclass(frozen=True)
class GroupedQkv:
    """Megatron's linear_qkv, [G (H / G + 2) h', h]: queries, key and value of group 0, then of group 1, ..."""

    heads: int
    groups: int
    head_dim: int

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Split into queries [H h', h], keys [G h', h] and values [G h', h], with heads in order."""
        queries = self.heads // self.groups
        blocks = tensor.unflatten(0, (self.groups, queries + 2, self.head_dim))  # [G, H / G + 2, h', h]
        return tuple(part.flatten(0, 2) for part in blocks.split((queries, 1, 1), dim=1))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave queries, keys and values by group."""
        blocks = [part.unflatten(0, (self.groups, -1, self.head_dim)) for part in parts]
        return torch.cat(blocks, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Weight:
    """One weight of this project, and the tensors that correspond to it in transformers."""

    name: str
    """Megatron's global name."""

    shape: tuple[int, ...]
    """The global shape in a checkpoint."""

    parts: tuple[str, ...]
    """Names of the corresponding tensors in transformers, in the order of ``fusion.split``."""

    fusion: Fusion = SINGLE_TENSOR

    is_trained: bool = True
    """Whether the optimizer updates it; other weights are fp32 everywhere."""

    derived_from: tuple[str, ...] = ()
    """Tensors in transformers from which an import makes a weight without ``parts``."""

    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of ``parts``."""
        return tuple(tuple(part.shape) for part in self.fusion.split(torch.empty(self.shape, device="meta")))

    @property
    def module_shape(self) -> tuple[int, ...]:
        """The global shape in a module's state dict, and in Megatron-LM."""
        return tuple(self.for_module(torch.empty(self.shape, device="meta")).shape)

    def for_module(self, tensor: Tensor) -> Tensor:
        """Convert from checkpoint layout to a module's layout; returns a view."""
        return _GATED.fold(tensor) if isinstance(self.fusion, GateAndUp) else tensor

    def from_module(self, tensor: Tensor) -> Tensor:
        """Convert from a module's layout to checkpoint layout; inverse of ``for_module``."""
        return _GATED.unfold(tensor) if isinstance(self.fusion, GateAndUp) else tensor

    def megatron_names(self) -> tuple[str, str]:
        """Return the name in Megatron-LM's checkpoints, and the name if its norms are separate modules."""
        joined = _replaced(self.name, _LINEAR)
        return _replaced(joined, _NORMS), joined


def read_for_export(weight: Weight, read: Callable[[str], Tensor]) -> Tensor:
    """Read a weight as transformers needs it: thresholds that no update has set are NaN."""
    tensor = read(weight.name)
    if not weight.name.endswith(_THRESHOLDS):
        return tensor
    return tensor.masked_fill(read(weight.name.replace(_THRESHOLDS, _UPDATES)) == 0, torch.nan)


def lacks_thresholds(weights: Iterable[Weight], read: Callable[[str], Tensor]) -> bool:
    """Return whether heads that select by thresholds have some that no update has set.

    Such heads select by expert choice until then, so the model looks ahead, whatever its configuration says.
    """
    return any(bool((read(weight.name) == 0).any()) for weight in weights if weight.name.endswith(_UPDATES))


def stacked(name: str) -> tuple[str, int | None]:
    """Return the key of the tensor [L, ...] that stacks all layers, and the layer index; None: not in a layer."""
    layer = _LAYER.search(name)
    return _LAYER.sub(".layers.", name), int(layer[1]) if layer else None


def num_parameters(weights: Iterable[Weight]) -> int:
    """Return the number of parameters as training and transformers count them: without thresholds and the like."""
    return sum(torch.Size(weight.shape).numel() for weight in weights if weight.is_trained)


def model_weights(config: Config, vocab_rows: int) -> list[Weight]:
    """List all weights of a model: embedding first, then layer by layer.

    Args:
        config: configuration of the model.
        vocab_rows: rows of the embedding, padding included.
    """
    model = config.model
    embedding = (vocab_rows, model.hidden_size)
    weights = [Weight("embedding.word_embeddings.weight", embedding, ("model.embed_tokens.weight",))]
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        weights += _norm(config, ours + "input_layernorm", theirs + "input_layernorm")
        weights += _attention(config, ours + "self_attention.", theirs + "self_attn.")
        weights += _norm(config, ours + "pre_mlp_layernorm", theirs + "post_attention_layernorm")
        weights += _mlp(config, ours + "mlp.", theirs + "mlp.")
    weights += _norm(config, "decoder.final_layernorm", "model.norm")
    if not model.tie_embeddings:
        weights.append(Weight("output_layer.weight", embedding, ("lm_head.weight",)))
    return weights


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


def _norm(config: Config, ours: str, theirs: str) -> Iterator[Weight]:
    for part in ("weight", "bias") if config.model.normalization == "LayerNorm" else ("weight",):
        yield Weight(f"{ours}.{part}", (config.model.hidden_size,), (f"{theirs}.{part}",))


def _attention(config: Config, ours: str, theirs: str) -> Iterator[Weight]:
    for kind in KINDS:
        heads, groups = kind.count(config), kind.groups(config)
        for name, shape in kind.weights(config).items() if heads else ():
            # Heads with Megatron's layout consist of linear layers in transformers; others keep their tensors.
            parts, fusion = (name,), SINGLE_TENSOR
            if groups is not None:
                parts = tuple(f"{part}_proj.weight" for part in _PROJECTIONS[name])
            if groups is not None and name == "qkv_weight":
                fusion = GroupedQkv(heads, groups, config.model.head_dim)
            prefix = f"{theirs}{kind.name}_heads."
            yield Weight(f"{ours}{kind.name}_heads.{name}", shape, tuple(prefix + part for part in parts), fusion)
        for name, shape in kind.state(config).items() if heads else ():
            part = f"{kind.name}_heads.{name}"
            yield Weight(ours + part, shape, (theirs + part,), is_trained=False)
    mosa_heads = config.mosa.num_heads
    if mosa_heads and config.mosa.selection == "token_choice":
        bias = "mosa_heads.head_bias"
        yield Weight(ours + bias, (mosa_heads,), (theirs + bias,), is_trained=False)
    if mosa_heads and config.mosa.selection == "threshold":
        shape, exported = (mosa_heads,), (f"{theirs}mosa_heads.thresholds",)
        yield Weight(f"{ours}mosa_heads.thresholds", shape, exported, Thresholds(), is_trained=False)
        updates = f"{ours}mosa_heads.threshold_updates"
        yield Weight(updates, shape, (), ThresholdUpdates(), is_trained=False, derived_from=exported)


def _mlp(config: Config, ours: str, theirs: str) -> Iterator[Weight]:
    width, inner = config.model.hidden_size, config.model.mlp_width
    if config.model.activation == "swiglu":
        parts = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
        yield Weight(f"{ours}linear_fc1.weight", (2, inner, width), parts, GateAndUp())
    else:
        yield Weight(f"{ours}linear_fc1.weight", (inner, width), (f"{theirs}up_proj.weight",))
    yield Weight(f"{ours}linear_fc2.weight", (width, inner), (f"{theirs}down_proj.weight",))
