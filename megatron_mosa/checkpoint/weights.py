"""How weights are called and laid out, here, in transformers and in Megatron-LM: described once, for every conversion.

In transformers a projection is a matrix of its own; here some of them lie in one tensor. Weights of MoSA heads are the
same on both sides: ``router_weight`` [E, h], ``qkv_weight`` [E, h, 3h'] with columns q, k, v, ``proj_weight``
[E, h', h], and ``thresholds`` [E] where they select by these. Megatron-LM has dense heads alone, laid out as here; its
layers lie in one tensor [L, ...], or each in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_mosa.config import Config
from megatron_mosa.parallel import Partition

CALIBRATED = 2.0**20  # updates of thresholds that come from elsewhere: more than any warm-up takes
_GATED = Partition(dim=0, stride=2)  # how a module holds the two matrices of a gated MLP

# Parts of names of ours, and of Megatron-LM's: a norm belongs to the matrix behind it, as in Transformer Engine.
_LINEAR = {
    ".self_attention.dense_heads.qkv_weight": ".self_attention.linear_qkv.weight",
    ".self_attention.dense_heads.proj_weight": ".self_attention.linear_proj.weight",
}
_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Fusion(Protocol):
    """How several matrices lie in one tensor."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The matrices, as views where they can be."""
        ...

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``."""
        ...


class Alone:
    """One tensor, the same on both sides."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """As Fusion."""
        return (tensor,)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """As Fusion."""
        return parts[0]


ALONE = Alone()


class GateAndUp:
    """The first matrices of a gated MLP, [2, n, h]: gate and up, as checkpoints keep them (``Partition.unfold``)."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Gate [n, h] and up [n, h]."""
        return tensor.unbind(0)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """As Fusion."""
        return torch.stack(tuple(parts))


@dataclass(frozen=True)
class NotThere:
    """A tensor that transformers has no use for; read back, it has one value everywhere."""

    shape: tuple[int, ...]
    value: float

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """As Fusion: none."""
        return ()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """As Fusion, of none."""
        return torch.full(self.shape, self.value)


@dataclass(frozen=True)
class GroupedQkv:
    """Megatron's linear_qkv, [G (H / G + 2) h', h]: queries, key and value of group 0, then those of group 1, ..."""

    heads: int
    groups: int
    head_dim: int

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Queries [H h', h], keys [G h', h] and values [G h', h], heads in order."""
        queries = self.heads // self.groups
        blocks = tensor.unflatten(0, (self.groups, queries + 2, self.head_dim))  # [G, H / G + 2, h', h]
        return tuple(part.flatten(0, 2) for part in blocks.split((queries, 1, 1), dim=1))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """As Fusion."""
        blocks = [part.unflatten(0, (self.groups, -1, self.head_dim)) for part in parts]
        return torch.cat(blocks, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Weight:
    """One parameter of ours, and the tensors that it is in transformers."""

    name: str
    """Megatron's global name."""

    shape: tuple[int, ...]
    """The global shape, as in a checkpoint."""

    parts: tuple[str, ...]
    """Names in transformers."""

    fusion: Fusion = ALONE

    is_trained: bool = True
    """Whether an optimizer steps it; what it does not is fp32 everywhere."""

    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes in transformers."""
        return tuple(tuple(part.shape) for part in self.fusion.split(torch.empty(self.shape, device="meta")))

    @property
    def module_shape(self) -> tuple[int, ...]:
        """The global shape in a module's state dict, and in Megatron-LM."""
        return tuple(self.for_module(torch.empty(self.shape, device="meta")).shape)

    def for_module(self, tensor: Tensor) -> Tensor:
        """As a module holds it, of what a checkpoint does; a view."""
        return _GATED.fold(tensor) if isinstance(self.fusion, GateAndUp) else tensor

    def from_module(self, tensor: Tensor) -> Tensor:
        """The inverse of ``for_module``."""
        return _GATED.unfold(tensor) if isinstance(self.fusion, GateAndUp) else tensor

    def megatron_names(self) -> tuple[str, str]:
        """Names in Megatron-LM: of its checkpoints, and where a norm is a module of its own there, too."""
        joined = _replaced(self.name, _LINEAR)
        return _replaced(joined, _NORMS), joined


def stacked(name: str) -> tuple[str, int | None]:
    """The name without a layer's number, of the layers in one tensor [L, ...], and the number; None: not of a layer."""
    layer = _LAYER.search(name)
    return _LAYER.sub(".layers.", name), int(layer[1]) if layer else None


def partition_keys(keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """Keys of tensors in a checkpoint of Megatron-LM's: of weights, and of optimizer state."""
    weights: list[str] = []
    optimizer: list[str] = []
    for key in keys:
        (optimizer if _OPTIMIZER.match(key) else weights).append(key)
    return weights, optimizer


def model_weights(config: Config, vocab_rows: int) -> list[Weight]:
    """All weights of a model, embedding first, layer by layer.

    Args:
        config: of the model.
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
    model, selecting = config.model, config.mosa.num_heads
    width, head_dim, dense, local = model.hidden_size, model.head_dim, model.num_dense_heads, model.num_local_heads
    for kind, heads, groups in (
        ("dense_heads", dense, model.num_query_groups or dense),
        ("local_heads", local, local),
    ):
        if heads:
            yield Weight(
                f"{ours}{kind}.qkv_weight",
                ((heads + 2 * groups) * head_dim, width),
                tuple(f"{theirs}{kind}.{part}_proj.weight" for part in "qkv"),
                GroupedQkv(heads, groups, head_dim),
            )
            shape = (width, heads * head_dim)
            yield Weight(f"{ours}{kind}.proj_weight", shape, (f"{theirs}{kind}.o_proj.weight",))
    if selecting:
        shapes = {
            "router_weight": (selecting, width),
            "qkv_weight": (selecting, width, 3 * head_dim),
            "proj_weight": (selecting, head_dim, width),
        }
        for name, shape in shapes.items():
            yield Weight(f"{ours}mosa_heads.{name}", shape, (f"{theirs}mosa_heads.{name}",))
    if selecting and config.mosa.selection == "threshold":
        name, shape = "mosa_heads.thresholds", (selecting,)
        yield Weight(ours + name, shape, (theirs + name,), is_trained=False)
        yield Weight(f"{ours}mosa_heads.threshold_updates", shape, (), NotThere(shape, CALIBRATED), is_trained=False)


def _mlp(config: Config, ours: str, theirs: str) -> Iterator[Weight]:
    width, inner = config.model.hidden_size, config.model.mlp_width
    if config.model.activation == "swiglu":
        parts = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
        yield Weight(f"{ours}linear_fc1.weight", (2, inner, width), parts, GateAndUp())
    else:
        yield Weight(f"{ours}linear_fc1.weight", (inner, width), (f"{theirs}up_proj.weight",))
    yield Weight(f"{ours}linear_fc2.weight", (width, inner), (f"{theirs}down_proj.weight",))
