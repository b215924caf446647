"""Configuration: typed dataclasses behind YAML files and ``section.key=value`` overrides."""

from megatron_mosa.config.load import config_from_dict, config_to_dict, load_config, origins, save_config
from megatron_mosa.config.rules import check_world_size, padded_vocab_size
from megatron_mosa.config.schema import Config

__all__ = [
    "Config",
    "check_world_size",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "origins",
    "padded_vocab_size",
    "save_config",
]
