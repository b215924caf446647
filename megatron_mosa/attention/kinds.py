"""All kinds of attention heads: the only list of them above the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_mosa.attention.functional import num_selected_tokens
from megatron_mosa.attention.kind import CausalKind, HeadKind
from megatron_mosa.config import Config
from megatron_mosa.utils import counted

if TYPE_CHECKING:
    from megatron_mosa.attention.heads import PartitionedHeads

Number = TypeVar("Number", int, float)


def dense_head_flops(hidden_size: int, head_dim: int, sequence_length: int) -> int:
    """Return the forward FLOPs of one dense head on one sequence: 8 h h' T + 4 h' T^2."""
    return 8 * hidden_size * head_dim * sequence_length + 4 * head_dim * sequence_length**2


def mosa_head_flops(hidden_size: int, head_dim: int, sequence_length: int, num_selected: Number) -> Number:
    """Return the forward FLOPs of one MoSA head on one sequence: 8 h h' k + 4 h' k^2 + 2 h T + h' k."""
    return (
        8 * hidden_size * head_dim * num_selected
        + 4 * head_dim * num_selected**2
        + 2 * hidden_size * sequence_length
        + head_dim * num_selected
    )


def routing_head_flops(hidden_size: int, head_dim: int, sequence_length: int, num_selected: int, clusters: int) -> int:
    """Return the forward FLOPs of one Routing head on one sequence: 6 h h' T + 4 h' k^2 rho + 2 h' T.

    The paper counts the products of all tokens with one of the rho centroids.
    """
    return (
        6 * hidden_size * head_dim * sequence_length
        + 4 * head_dim * num_selected**2 * clusters
        + 2 * head_dim * sequence_length
    )


def local_head_flops(hidden_size: int, head_dim: int, sequence_length: int, window: int) -> int:
    """Return the forward FLOPs of one sliding-window head on one sequence: 8 h h' T + 4 h' T w (not in the paper)."""
    return 8 * hidden_size * head_dim * sequence_length + 4 * head_dim * sequence_length * window


def local_window(config: Config) -> int:
    """Return the window of a local head in tokens: ``model.local_window``, or T / rho as in the paper's long runs."""
    selected = num_selected_tokens(config.data.sequence_length, config.mosa.sparsity)
    return min(config.model.local_window or selected, config.data.sequence_length)


def causal_pairs(tokens: float) -> float:
    """Return the number of pairs of a query and a key at or before it."""
    return tokens * (tokens + 1) / 2


class DenseKind(CausalKind):
    """Dense heads."""

    word = "dense"

    def module(self) -> type[PartitionedHeads]:
        from megatron_mosa.attention.causal_heads import DenseHeads

        return DenseHeads

    def groups(self, config: Config) -> int:
        heads = self.count(config)
        return min(config.model.num_query_groups or heads, heads)  # none without heads

    def paper_pairs(self, config: Config) -> int:
        return config.data.sequence_length**2

    def num_pairs(self, config: Config, lengths: Sequence[int], pairs: Callable[[float], float]) -> float:
        return sum(map(pairs, lengths))

    def describe(self, config: Config) -> str:
        groups = f" in {counted(config.model.num_query_groups, 'group')}" if config.model.num_query_groups else ""
        return f"{self.count(config)} dense{groups}"


class LocalKind(CausalKind):
    """Local heads."""

    word = "local"

    def module(self) -> type[PartitionedHeads]:
        from megatron_mosa.attention.causal_heads import LocalHeads

        return LocalHeads

    def paper_pairs(self, config: Config) -> int:
        return config.data.sequence_length * local_window(config)

    def num_pairs(self, config: Config, lengths: Sequence[int], pairs: Callable[[float], float]) -> float:
        window = local_window(config)
        return sum(causal_pairs(length) - causal_pairs(max(length - window, 0)) for length in lengths)

    def describe(self, config: Config) -> str:
        return f"{self.count(config)} sliding-window"

    def exported(self, config: Config) -> dict[str, Any]:
        return super().exported(config) | {"local_window": local_window(config) if self.count(config) else 0}

    def imported(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        return {"model.local_window": theirs["local_window"]} if theirs["num_local_heads"] else {}


class FixedKind(CausalKind):
    """Fixed heads."""

    word = "fixed"

    def module(self) -> type[PartitionedHeads]:
        from megatron_mosa.attention.fixed_heads import FixedHeads

        return FixedHeads

    def is_gated(self, config: Config) -> bool:
        return False

    def num_tokens(self, config: Config) -> int:
        return -(-config.data.sequence_length // config.fixed_stride)

    def paper_pairs(self, config: Config) -> int:
        return self.num_tokens(config) ** 2

    def num_pairs(self, config: Config, lengths: Sequence[int], pairs: Callable[[float], float]) -> float:
        share = self.num_tokens(config) / config.data.sequence_length
        return sum(pairs(share * length) for length in lengths)

    def describe(self, config: Config) -> str:
        return f"{self.count(config)} fixed (stride {config.fixed_stride})"

    def exported(self, config: Config) -> dict[str, Any]:
        return super().exported(config) | {"fixed_stride": config.fixed_stride if self.count(config) else 0}

    def imported(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        heads = theirs.get("num_fixed_heads", 0)
        return {"model.num_fixed_heads": heads} | ({"model.fixed_stride": theirs["fixed_stride"]} if heads else {})


class RoutingKind(HeadKind):
    """Heads of the Routing Transformer."""

    word = "routing"

    def module(self) -> type[PartitionedHeads]:
        from megatron_mosa.attention.routing_heads import RoutingHeads

        return RoutingHeads

    def weights(self, config: Config) -> dict[str, tuple[int, ...]]:
        heads, width, head_dim = self.count(config), config.model.hidden_size, config.model.head_dim
        return {"qv_weight": (2 * heads * head_dim, width), "proj_weight": (width, heads * head_dim)}

    def state(self, config: Config) -> dict[str, tuple[int, ...]]:
        return {"centroids": (self.count(config), config.routing_clusters, config.model.head_dim)}

    def num_selected(self, config: Config) -> int:
        """Return k, the number of tokens that a centroid takes."""
        return num_selected_tokens(config.data.sequence_length, config.routing_clusters)

    def paper_flops(self, config: Config) -> int:
        model, length = config.model, config.data.sequence_length
        selected, clusters = self.num_selected(config), config.routing_clusters
        return self.count(config) * routing_head_flops(model.hidden_size, model.head_dim, length, selected, clusters)

    def step_flops(self, config: Config, lengths: Sequence[int], pairs: Callable[[float], float]) -> float:
        model, length, clusters = config.model, config.data.sequence_length, config.routing_clusters
        share = self.num_selected(config) / length
        attention = 4 * model.head_dim * clusters * sum(pairs(share * document) for document in lengths)
        clustering = 2 * model.head_dim * length * clusters  # has no gradient
        products = 6 * model.hidden_size * model.head_dim * length
        return self.count(config) * (3 * (products + attention) + clustering)

    def looks_ahead(self, config: Config) -> bool:
        return True

    def describe(self, config: Config) -> str:
        return f"{self.count(config)} Routing ({config.routing_clusters} clusters)"

    def exported(self, config: Config) -> dict[str, Any]:
        return super().exported(config) | {"routing_clusters": config.routing_clusters if self.count(config) else 0}

    def imported(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        heads = theirs.get("num_routing_heads", 0)
        return {"model.num_routing_heads": heads} | (
            {"model.routing_clusters": theirs["routing_clusters"]} if heads else {}
        )


class MosaKind(HeadKind):
    """MoSA heads."""

    word = "MoSA"

    def module(self) -> type[PartitionedHeads]:
        from megatron_mosa.attention.mosa_heads import MosaHeads

        return MosaHeads

    def weights(self, config: Config) -> dict[str, tuple[int, ...]]:
        heads, width, head_dim = self.count(config), config.model.hidden_size, config.model.head_dim
        return {
            "router_weight": (heads, width),
            "qkv_weight": (heads, width, 3 * head_dim),
            "proj_weight": (heads, head_dim, width),
        }

    def paper_flops(self, config: Config) -> int:
        model, length = config.model, config.data.sequence_length
        (selected,) = self._selected(config, [length])
        return round(self.count(config) * mosa_head_flops(model.hidden_size, model.head_dim, length, selected))

    def step_flops(self, config: Config, lengths: Sequence[int], pairs: Callable[[float], float]) -> float:
        hidden, head_dim, length = config.model.hidden_size, config.model.head_dim, config.data.sequence_length
        selected = self._selected(config, lengths)
        heads = 8 * hidden * head_dim * sum(selected) + 4 * head_dim * sum(map(pairs, selected))
        router = 2 * hidden * length + 4 * hidden * sum(selected)  # its gradient is nonzero at selected tokens only
        return self.count(config) * (3 * heads + router)

    def _selected(self, config: Config, lengths: Sequence[int]) -> list[float]:
        """Return how many tokens of each document a head selects, in proportion to its length if per sequence."""
        length, sparsity = config.data.sequence_length, config.mosa.sparsity
        if config.mosa.selection == "token_choice":  # equal loads
            return [document * config.heads_per_token / max(self.count(config), 1) for document in lengths]
        if config.mosa.selection_scope == "document":
            return [num_selected_tokens(document, sparsity) for document in lengths]
        return [num_selected_tokens(length, sparsity) * document / length for document in lengths]

    def looks_ahead(self, config: Config) -> bool:
        return config.mosa.selection == "expert_choice"

    def describe(self, config: Config) -> str:
        how = ", token choice" if config.mosa.selection == "token_choice" else ""
        return f"{self.count(config)} MoSA (sparsity {config.mosa.sparsity:g}{how})"


# In the order in which a layer adds them up.
KINDS: tuple[HeadKind, ...] = (DenseKind(), LocalKind(), FixedKind(), RoutingKind(), MosaKind())


def looks_ahead(config: Config) -> bool:
    """Return whether a model has heads whose outputs depend on later tokens, such as expert choice."""
    return any(kind.count(config) and kind.looks_ahead(config) for kind in KINDS)
