"""Configurations as text: the annotated reference, a resolved configuration and the difference of two."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from typing import Any

import yaml

from megatron_mosa.config.heads import head_counts
from megatron_mosa.config.keys import Key, default_of
from megatron_mosa.config.load import config_to_dict, escaped
from megatron_mosa.config.schema import Config
from megatron_mosa.utils import counted

_HEADER = """\
# Every key with its default, meaning and bounds. A file must set the keys marked ??? and any others that differ.
# Any key can be overridden on the command line: pretrain_mosa.py FILE section.key=value
# Generated from megatron_mosa/config/schema.py: mosa config show > configs/reference.yaml
"""
REFERENCE_FILE = "reference.yaml"

_COMMENT_COLUMN = 34


def reference() -> str:
    """Return the annotated reference as YAML: every key with its default, meaning and bounds."""

    def line(section: str, item: Field[Any]) -> tuple[Any, str]:
        key: Key = item.metadata["key"]
        return default_of(item), key.comment + (f"; {key.interval()}" if key.interval() else "")

    return f"{_HEADER}\n{_yaml(line)}"


def resolved(config: Config, origins: dict[str, str]) -> str:
    """Return every key of a configuration as YAML, with the origin of its value as a comment.

    Args:
        origins: by ``section.key``, as returned by ``config.origins``.
    """
    tree = config_to_dict(config)

    def line(section: str, item: Field[Any]) -> tuple[Any, str]:
        return tree[section][item.name], origins[f"{section}.{item.name}"]

    return _yaml(line)


def difference(first: Config, second: Config) -> Iterable[tuple[str, str, str]]:
    """Yield each ``section.key`` whose values differ, with both values as YAML."""
    ours, theirs = config_to_dict(first), config_to_dict(second)
    for section, values in ours.items():
        for name, value in values.items():
            if value != theirs[section][name]:
                yield f"{section}.{name}", _scalar(value), _scalar(theirs[section][name])


def selection_in_words(selection: str) -> str:
    """Return how MoSA heads select, to stand behind their number; "" for expert choice."""
    return {"threshold": " with thresholds", "token_choice": " by token choice"}.get(selection, "")


def summary(config: Config) -> str:
    """Return the model in a few words, such as "6 layers of width 512, 4 dense + 17 MoSA heads, 1,024 tokens"."""
    model = config.model
    counts = {kind: count for kind, (_, count) in head_counts(config).items() if count}
    heads = " + ".join(f"{count} {kind}" for kind, count in counts.items())
    heads += " head" if sum(counts.values()) == 1 else " heads"
    if config.mosa.num_heads:
        heads += selection_in_words(config.mosa.selection)
    layers, tokens = counted(model.num_layers, "layer"), counted(config.data.sequence_length, "token")
    return f"{layers} of width {model.hidden_size}, {heads}, {tokens}"


def _yaml(line: Callable[[str, Field[Any]], tuple[Any, str]]) -> str:
    lines: list[str] = []
    for section in fields(Config):
        lines.append(f"{section.name}:")
        for item in fields(getattr(Config(), section.name)):
            value, comment = line(section.name, item)
            lines.append(f"  {item.name}: {_scalar(value)}".ljust(_COMMENT_COLUMN - 1) + f" # {comment}")
        lines.append("")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    return inline_yaml(escaped(value))


def inline_yaml(value: Any) -> str:
    """Return a value as YAML on one line, from which ``load_config`` reads the same value, ``${NAME}`` aside."""
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


class _Dumper(yaml.SafeDumper):
    """Quotes text such as 1e5, too, which OmegaConf reads as a number, as YAML 1.2 does, though 1.1 does not."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9._]+[eE][-+]?[0-9]+$"), "-+.0123456789")
