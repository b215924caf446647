"""What the project knows about a kind of attention heads, as a function of the configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_mosa.config import Config, head_counts

if TYPE_CHECKING:
    from megatron_mosa.attention.heads import PartitionedHeads


class HeadKind(ABC):
    """A kind of attention heads: its module, weights and costs.

    The hybrid layer, FLOPs, parameter counts, checkpoints and conversions go through all kinds of ``kinds.KINDS``.
    """

    word: ClassVar[str]
    """The key in ``config.head_counts``, such as "MoSA"."""

    @abstractmethod
    def module(self) -> type[PartitionedHeads]:
        """Return the module of all heads of this kind in a layer; imported here, as costs do not need Megatron-core."""

    @property
    def name(self) -> str:
        """The name in modules and weights: "mosa", for ``mosa_heads``."""
        return self.word.lower()

    def count(self, config: Config) -> int:
        """Return the number of heads in a layer, over all tensor-parallel ranks."""
        return head_counts(config)[self.word].count

    @abstractmethod
    def weights(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Return the global shapes of the parameters of the module, by name."""

    def state(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Return the global shapes of the buffers that checkpoints and exported models contain, too, by name."""
        return {}

    def groups(self, config: Config) -> int | None:
        """Return the number of key and value heads in ``qkv_weight`` if it has Megatron's layout, else None."""
        return None

    @abstractmethod
    def paper_flops(self, config: Config) -> int:
        """Return the forward FLOPs of a layer's heads on one sequence, by the paper's formulas."""

    @abstractmethod
    def step_flops(self, config: Config, lengths: Sequence[int], pairs: Callable[[float], float]) -> float:
        """Return the FLOPs of a layer's heads that a step must execute for one sequence, forward and backward.

        Args:
            lengths: lengths of the documents of the sequence.
            pairs: counts the pairs of a query and a key among so many tokens.
        """

    def looks_ahead(self, config: Config) -> bool:
        """Return whether an output depends on later tokens, so that losses are labeled NON-CAUSAL."""
        return False

    def describe(self, config: Config) -> str:
        """Return the heads in a few words, such as "4 local"."""
        return f"{self.count(config)} {self.word}"

    def exported(self, config: Config) -> dict[str, Any]:
        """Return the arguments of transformers' ``MosaConfig`` that describe these heads."""
        return {f"num_{self.name}_heads": self.count(config)}

    def imported(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Return our values by ``section.key`` for those of a ``MosaConfig``, in which newer keys may be missing."""
        return {}


class CausalKind(HeadKind):
    """A kind whose module is one of ``CausalHeads``."""

    def groups(self, config: Config) -> int:
        return self.count(config)

    def is_gated(self, config: Config) -> bool:
        """Return whether the heads have an output gate."""
        return config.model.attention_gate

    def num_tokens(self, config: Config) -> int:
        """Return how many tokens of a sequence have queries, keys and values."""
        return config.data.sequence_length

    @abstractmethod
    def paper_pairs(self, config: Config) -> int:
        """Return how many pairs of query and key the paper counts: keys after a query, too."""

    @abstractmethod
    def num_pairs(self, config: Config, lengths: Sequence[int], pairs: Callable[[float], float]) -> float:
        """Return how many pairs must be computed, see ``step_flops``."""

    def weights(self, config: Config) -> dict[str, tuple[int, ...]]:
        heads, width, head_dim = self.count(config), config.model.hidden_size, config.model.head_dim
        shapes = {
            "qkv_weight": ((heads + 2 * self.groups(config)) * head_dim, width),
            "proj_weight": (width, heads * head_dim),
        }
        return shapes | ({"gate_weight": (heads, width)} if self.is_gated(config) else {})

    def paper_flops(self, config: Config) -> int:
        heads, head_dim, tokens = self.count(config), config.model.head_dim, self.num_tokens(config)
        gate = heads * head_dim * tokens if self.is_gated(config) else 0  # one product a channel, as MoSA's gate
        return self._products(config) + 4 * head_dim * heads * self.paper_pairs(config) + gate

    def step_flops(self, config: Config, lengths: Sequence[int], pairs: Callable[[float], float]) -> float:
        attention = 4 * config.model.head_dim * self.count(config) * self.num_pairs(config, lengths, pairs)
        return 3 * (self._products(config) + attention)

    def _products(self, config: Config) -> int:
        """Return the FLOPs of the products of tokens with all weights."""
        matrices = sum(rows * columns for rows, columns in self.weights(config).values())
        return 2 * matrices * self.num_tokens(config)
