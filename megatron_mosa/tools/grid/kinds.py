"""The kinds of members of a grid: which key a budget's heads are counted by, and what else a kind sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_mosa.attention import local_window
from megatron_mosa.config import Config, head_counts


@dataclass(frozen=True)
class MemberKind:
    """A kind of members: models whose heads, besides dense or local ones, are of one kind."""

    counts: str
    """The key that counts its heads."""

    sets: Mapping[str, Any] = field(default_factory=dict)
    """Other keys that make the kind what it is; a member may not set them otherwise."""

    has_ripples: bool = False
    """More heads may cost less, from one multiple of the sparsity to the next."""

    @property
    def is_dense(self) -> bool:
        return self.counts == "model.num_dense_heads"


# To add a kind of heads, add its entry here, and to ``_CACHED`` if it can be decoded.
KINDS: dict[str, MemberKind] = {
    "dense": MemberKind("model.num_dense_heads"),
    "fixed": MemberKind("model.num_fixed_heads", {"model.fixed_stride": None}),
    "routing": MemberKind("model.num_routing_heads", {"model.routing_clusters": None}),
    "expert_choice": MemberKind("mosa.num_heads", {"mosa.selection": "expert_choice", "mosa.load_feedback": 0.0}),
    "threshold": MemberKind("mosa.num_heads", {"mosa.selection": "threshold"}),
    "token_choice": MemberKind(
        "mosa.num_heads", {"mosa.selection": "token_choice", "mosa.load_feedback": 0.0}, has_ripples=True
    ),
}

_BESIDE = ("dense", "local")  # kinds of heads that stand beside those of a member's kind


def _mosa_keys(config: Config, length: int) -> float:
    if config.mosa.selection == "token_choice":
        return length * config.heads_per_token / config.mosa.num_heads
    return length / config.mosa.sparsity


# By the word of a kind of heads: how many tokens of a sequence a head keeps keys and values of, on average.
_CACHED: dict[str, Callable[[Config, int], float]] = {
    "dense": lambda config, length: length,
    "local": lambda config, length: min(local_window(config), length),
    "fixed": lambda config, length: -(-length // config.fixed_stride),
    "routing": lambda config, length: length,  # each of rho clusters takes a share of 1 / rho
    "MoSA": _mosa_keys,
}


def kv_bytes(config: Config, length: int, bytes_per_number: int = 2) -> int | None:
    """Return the bytes of keys and values that a decoder stores for one sequence, in all layers.

    Computed for loads that are as asked for; ``mosa cache-report`` measures them. Of heads that look ahead, which no
    decoder can run, it is what heads that see the past alone would store at the same sparsity.

    Args:
        length: tokens of the sequence.
        bytes_per_number: 2 for bf16.

    Returns:
        None if the model has heads of a kind for which this is not known.
    """
    model, pairs = config.model, 0.0
    for word, (_, count) in head_counts(config).items():
        if not count:
            continue
        if word not in _CACHED:
            return None
        heads = model.num_query_groups or count if word == "dense" else count
        pairs += heads * _CACHED[word](config, length)
    return round(2 * model.num_layers * pairs * model.head_dim * bytes_per_number)


def other_counts(kind: MemberKind) -> list[str]:
    """Return the keys that count heads which a member of this kind does not have."""
    counts = {word: key for word, (key, _) in head_counts(Config()).items()}
    return [key for word, key in counts.items() if word not in _BESIDE and key != kind.counts]
