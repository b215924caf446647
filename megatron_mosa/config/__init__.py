"""Configuration: typed dataclasses behind YAML files and ``section.key=value`` overrides."""

from megatron_mosa.config.blend import blend_parts
from megatron_mosa.config.heads import HeadCount, divisible_counts, head_counts
from megatron_mosa.config.keys import keys_of
from megatron_mosa.config.load import (
    config_from_dict,
    config_to_dict,
    expanded,
    load_config,
    origins,
    read_yaml,
    save_config,
)
from megatron_mosa.config.render import (
    REFERENCE_FILE,
    difference,
    inline_yaml,
    reference,
    resolved,
    selection_in_words,
    summary,
)
from megatron_mosa.config.rules import LONGEST_NAME, check, check_plan, check_world_size, padded_vocab_size
from megatron_mosa.config.schema import (
    CheckpointSection,
    Config,
    DataSection,
    FaultInjectionSection,
    ModelSection,
    MosaSection,
    OptimizerSection,
    ParallelSection,
    ResilienceSection,
    RunSection,
    TrainSection,
    default_load_feedback,
)

__all__ = [
    "LONGEST_NAME",
    "REFERENCE_FILE",
    "CheckpointSection",
    "Config",
    "DataSection",
    "FaultInjectionSection",
    "HeadCount",
    "ModelSection",
    "MosaSection",
    "OptimizerSection",
    "ParallelSection",
    "ResilienceSection",
    "RunSection",
    "TrainSection",
    "blend_parts",
    "check",
    "check_plan",
    "check_world_size",
    "config_from_dict",
    "config_to_dict",
    "default_load_feedback",
    "difference",
    "divisible_counts",
    "expanded",
    "head_counts",
    "inline_yaml",
    "keys_of",
    "load_config",
    "origins",
    "padded_vocab_size",
    "read_yaml",
    "reference",
    "resolved",
    "save_config",
    "selection_in_words",
    "summary",
]
