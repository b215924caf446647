"""YAML file plus ``section.key=value`` overrides to a checked, typed Config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from megatron_mosa.config.rules import check
from megatron_mosa.config.schema import Config
from megatron_mosa.errors import UserError, nearest


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides, check every rule.

    Raises:
        UserError: a file that cannot be read, an unknown or missing key, a wrong type, a broken rule.
    """
    return _build([_read(Path(path)), _parse_overrides(overrides)])


def config_from_dict(tree: dict[str, Any]) -> Config:
    """Build a checked Config from a nested dictionary (the form that checkpoints keep)."""
    return _build([tree])


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain dictionaries, lists and scalars."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"configuration file '{path}' does not exist; give the path of a YAML file, such as configs/quickstart.yaml"
        )
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"configuration file '{path}' is not valid YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"configuration file '{path}' must hold sections (run:, model:, ...), got {type(tree).__name__}"
        )
    return tree


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and section and name):
            raise UserError(f"override '{override}' is not of the form section.key=value, such as train.steps=100")
        try:
            tree.setdefault(section, {})[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"override '{override}': the value is not valid YAML; quote it") from None
    return tree


def _build(trees: list[dict[str, Any]]) -> Config:
    config = OmegaConf.structured(Config)
    for tree in trees:
        _refuse_unknown_keys(tree)
        for section, values in tree.items():
            for key, value in values.items():
                _set(config, f"{section}.{key}", value)
    try:
        built = cast(Config, OmegaConf.to_object(config))
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} is missing; it has no default, set it in the YAML file or as {error.full_key}=VALUE"
        ) from None
    check(built)
    return built


def _refuse_unknown_keys(tree: dict[str, Any]) -> None:
    known = Config()
    sections = [field.name for field in fields(known)]
    for section, values in tree.items():
        if section not in sections:
            raise UserError(
                f"unknown section '{section}'{nearest(str(section), sections)}; legal sections: {', '.join(sections)}"
            )
        if not isinstance(values, dict):
            raise UserError(f"section '{section}' must hold keys, got {values!r}")
        keys = [field.name for field in fields(getattr(known, section))]
        for key in values:
            if key not in keys:
                raise UserError(
                    f"unknown key '{section}.{key}'{nearest(str(key), keys)}; "
                    f"legal keys of '{section}': {', '.join(keys)}"
                )


def _set(config: Any, key: str, value: Any) -> None:
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException:
        section, name = key.split(".")
        types = {field.name: field.type for field in fields(getattr(Config(), section))}
        raise UserError(f"{key}={value!r} has the wrong type; legal: {types[name]}") from None
