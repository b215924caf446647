"""The kinds of attention heads, and how many of each a configuration asks for."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from megatron_mosa.config.keys import keys_of
from megatron_mosa.config.schema import Config


class HeadCount(NamedTuple):
    """How many heads of one kind a layer has."""

    key: str
    """The key that says so, such as "model.num_dense_heads"."""

    count: int


def head_counts(config: Config) -> dict[str, HeadCount]:
    """Return the count of each kind of heads, 0 included, by the kind's word: "dense", "local", "fixed", "MoSA".

    The kinds are those of the schema's keys that count heads. In names of modules and weights a kind's word is in lower
    case: ``mosa_heads``.
    """
    return {
        key.counts: HeadCount(f"{section.name}.{name}", getattr(getattr(config, section.name), name))
        for section in fields(config)
        for name, key in keys_of(type(getattr(config, section.name))).items()
        if key.counts
    }


def divisible_counts(config: Config) -> dict[str, int]:
    """Return the counts that the tensor-parallel size must divide, by key: of heads, 0 included, and query groups."""
    counts = dict(head_counts(config).values())
    groups = config.model.num_query_groups
    return counts if groups is None else counts | {"model.num_query_groups": groups}
