"""Loading and saving of a configuration: YAML plus ``section.key=value`` overrides to a checked, typed Config."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_mosa.config.rules import COMMAND_LINE, check
from megatron_mosa.config.schema import Config, default_load_feedback
from megatron_mosa.errors import UserError, nearest
from megatron_mosa.utils import is_plain, write_atomically

_TYPES = {
    section.name: {f.name: str(f.type) for f in fields(getattr(Config(), section.name))} for section in fields(Config)
}
_PATHS = ("run.directory", "data.path", "data.index_path", "checkpoint.initialize_from")
_BASE = "base"  # beside the sections
_MOST_BYTES, _MOST_VALUES = 2**20, 10_000
_MOST_BASES = 20
_OTHER_BASES = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)")
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?")
_BROKEN = (
    yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, TypeError, OverflowError, LookupError,
    AttributeError,
)  # fmt: skip
"""What the readers of YAML raise: the last two for values whose tags do not fit them, as in ``!!bool x``."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, checks_batches: bool = True) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides and check every rule.

    With ``base: OTHER.yaml`` at its top, the file overrides keys of another one, whose path is relative to its own.

    Args:
        checks_batches: False if ``check_world_size`` follows, which checks the batch sizes for all data-parallel ranks.

    Raises:
        UserError: an unreadable file, an unknown or missing key, a wrong type, or a broken rule.
    """
    trees = [tree for _, tree in _read_with_bases(Path(path))]
    return _build([*trees, _parse_overrides(overrides)], checks_batches)


def origins(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Return where each ``section.key`` gets its value: COMMAND_LINE, a file's path, or "default"."""
    written = [*_read_with_bases(Path(path)), (COMMAND_LINE, _parse_overrides(overrides))]
    found = {f"{section}.{name}": "default" for section, names in _TYPES.items() for name in names}
    for origin, tree in written:
        found |= {f"{section}.{name}": origin for section, values in tree.items() for name in values}
    return found


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Build a checked Config from a nested dictionary (the form that checkpoints keep), whose texts are final."""
    return _build([escaped(tree)])


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested plain dictionaries, lists and scalars."""
    return asdict(config)


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    write_atomically(Path(path), OmegaConf.to_yaml(escaped(config_to_dict(config))))


def escaped(value: Any) -> Any:
    """Return a value with ``\\${`` for each ``${`` in its texts, which OmegaConf would replace by another value."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list) else value


def expanded(key: str, path: str) -> Path:
    """Return a path with the home directory in place of ``~`` or ``~user``.

    Args:
        key: of the configuration, for the error.

    Raises:
        UserError: the user does not exist, or the locale's encoding cannot spell the path.
    """
    try:
        os.fsencode(path)
        return Path(path).expanduser()
    except UnicodeEncodeError:
        raise UserError(
            f"{key}={path} cannot be the path of a file in this locale, whose encoding is "
            f"{sys.getfilesystemencoding()}; set LC_ALL=C.UTF-8 (or PYTHONUTF8=1) and start again"
        ) from None
    except RuntimeError:
        raise UserError(f"{key}={path} refers to the home directory of an unknown user; give a full path") from None


def _read_with_bases(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the files that make up a configuration, each with its sections; later ones override earlier ones."""
    tree = read_yaml(path)
    chain, seen = [(str(path), tree)], {path.resolve()}
    while (base := tree.pop(_BASE, None)) is not None:
        if not (isinstance(base, str) and base and "\0" not in base):
            raise UserError(f"{path}: base must be the path of another YAML file, got {base!r}")
        here, path = path, path.parent / expanded(_BASE, base)
        try:
            tree = read_yaml(path)
        except UserError as error:
            raise UserError(f"{here}: base={base}: {error}") from None
        if path.resolve() in seen:
            raise UserError(f"{here}: base={base} is based on this file itself; remove one base")
        if len(chain) == _MOST_BASES:
            raise UserError(f"{here}: base={base} is file {_MOST_BASES + 1} of a chain; the most are {_MOST_BASES}")
        seen.add(path.resolve())
        chain.insert(0, (str(path), tree))
    return chain


def read_yaml(path: Path, what: str = "configuration file", example: str = "configs/quickstart.yaml") -> dict[str, Any]:
    """Return what a YAML file holds.

    Args:
        what: what it should be.
        example: one of these.

    Raises:
        UserError: it is unreadable, too large, or does not hold keys.
    """
    if not path.is_file():
        why = "is a directory" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
        raise UserError(f"{what} '{path}' {why}; give a YAML file such as {example}")
    try:
        _refuse_expansion(path)
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)  # its loader rejects duplicate keys
    except OSError as error:
        raise UserError(f"{what} '{path}' cannot be read: {error.strerror}") from None
    except _BROKEN as error:
        is_bare = isinstance(error, LookupError | AttributeError)
        reason = "a value does not fit its tag" if is_bare else " ".join(str(error).split())
        raise UserError(f"{what} '{path}' is not valid YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{what} '{path}' must hold keys, as {example} does, got {type(tree).__name__}")
    return cast(dict[str, Any], tree)


def _refuse_expansion(path: Path) -> None:
    """Refuse a file too large for a configuration, or whose aliases, once expanded, would fill the memory or never end.

    Also refuses numbers that are not what they look like.

    Raises:
        ValueError: it is.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if sizes.get(id(node)) == 0:
            raise ValueError(f"line {node.start_mark.line + 1} contains an alias of itself")
        if id(node) not in sizes:
            sizes[id(node)] = 0  # until it is known
            if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")):
                _refuse_other_bases(node.value)
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + (sum(map(size, parts)) if not isinstance(node, yaml.ScalarNode) else 0)
        return sizes[id(node)]

    with path.open(encoding="utf-8") as file:
        root = yaml.compose(file, yaml.SafeLoader)
    if root is not None and size(root) > _MOST_VALUES:
        raise ValueError(f"its aliases expand to more than {_MOST_VALUES:,} values")


def _refuse_other_bases(number: str) -> None:
    """Raise a ValueError for 010, which is 8 in YAML 1.1, and for 1:30 and 1:30.5, which are 90 and 90.5."""
    if _OTHER_BASES.fullmatch(number):
        raise ValueError(
            f"{number} has a leading zero or colons, so YAML takes it for a number to the base of 8 or 60; write it in "
            "decimal, or quote it if it is text"
        )


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and section and name):
            raise UserError(f"override '{override}' is not of the form section.key=value, such as train.steps=100")
        kind = _TYPES.get(section, {}).get(name, "")
        value: Any = text
        # Text stays as typed (007, on, 1:30); values of other types are parsed as YAML.
        is_text = kind == "str" or (kind == "str | None" and text != "null")
        if is_text and len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
            raise UserError(f"override '{override}': the value would keep its quotes; leave them out")
        if not is_text:
            try:
                value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload]
            except _BROKEN:
                raise UserError(f"override '{override}': the value is not valid YAML; quote it") from None
            try:
                numbers = re.split(r"[\[\],\s]+", text) if isinstance(value, list) else [text.strip()]
                for number in [] if "str" in kind else numbers:
                    _refuse_other_bases(number)
            except ValueError as error:
                raise UserError(f"override '{override}': {error}") from None
        if value == MISSING:
            raise UserError(f"override '{override}': {MISSING} marks a missing value; give one, or leave it out")
        tree.setdefault(section, {})[name] = value
    return tree


def _build(trees: list[dict[str, Any]], checks_batches: bool = True) -> Config:
    config = OmegaConf.structured(Config)
    for tree in trees:
        _refuse_unknown_keys(tree)
        for section, values in tree.items():
            for name, value in values.items():
                if value == MISSING:  # as in the annotated reference
                    continue
                _set(config, section, name, value)
    try:
        built = cast(Config, OmegaConf.to_object(config))
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} is missing; it has no default, set it in the YAML file or as {error.full_key}=VALUE"
        ) from None
    except _BROKEN as error:
        raise UserError(f"the configuration cannot be resolved: {' '.join(str(error).split())}") from None
    built.model.ffn_hidden_size = built.model.mlp_width
    if built.mosa.load_feedback is None:
        built.mosa.load_feedback = default_load_feedback(built.mosa.selection)
    check(built, checks_batches=checks_batches)
    return built


def _refuse_unknown_keys(tree: dict[str, Any]) -> None:
    for section, values in tree.items():
        if section not in _TYPES:
            raise UserError(
                f"unknown section '{section}'{nearest(str(section), _TYPES)}; the sections are {', '.join(_TYPES)}"
            )
        if not isinstance(values, dict):
            raise UserError(f"section '{section}' must hold keys, got {values!r}")
        for key in values:
            if key not in _TYPES[section]:
                raise UserError(
                    f"unknown key '{section}.{key}'{nearest(str(key), _TYPES[section])}; "
                    f"the keys of '{section}' are {', '.join(_TYPES[section])}"
                )


def _set(config: Any, section: str, name: str, value: Any) -> None:
    key, kind = f"{section}.{name}", _TYPES[section][name]
    if key in _PATHS and value == "":
        raise UserError(f"{key} is empty; give a path, or leave it out")
    if isinstance(value, str) and not is_plain(value):
        raise UserError(f"{key} must be UTF-8 text without control characters, got {value!r}")
    fits = _fits(value, kind.removesuffix(" | None")) or (value is None and kind.endswith("| None"))
    if fits and key in _PATHS and isinstance(value, str):
        value = str(expanded(key, value))
    try:
        if fits:
            OmegaConf.update(config, key, value)
            return
    except _BROKEN:
        pass
    hint = "; quote it" if kind.startswith("str") else ""
    if kind.startswith(("int", "float")) and isinstance(value, str) and _THOUSANDS.fullmatch(value):
        hint = f"; a number has no commas between thousands, write {value.replace(',', '')}"
    try:
        shown = repr(value) if len(repr(value)) <= 200 else f"{repr(value)[:100]}..."
    except ValueError:  # Python prints no integer of more than 4,300 digits
        shown = "a number of thousands of digits"
    raise UserError(f"{key} must be of type {kind}, got {shown}{hint}") from None


def _fits(value: Any, kind: str) -> bool:
    """Return whether a value has a type; OmegaConf would turn 7 into '7', 2 into true and '3' into 3."""
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    if kind == "list[int]":
        return isinstance(value, list) and all(_fits(item, "int") for item in value)
    if kind == "float":
        return isinstance(value, float) or _fits(value, "int")
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, {"bool": bool, "str": str}[kind])
