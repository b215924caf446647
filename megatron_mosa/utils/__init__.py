"""Helpers without a subject of their own: atomic files, JSON, versions, processors, progress, words, first lines."""

from megatron_mosa.utils.errors import file_problem, first_line
from megatron_mosa.utils.files import (
    REPLACED,
    creation_problem,
    free_megabytes,
    naming,
    replace_directory,
    sync,
    tolerating,
    write_atomically,
)
from megatron_mosa.utils.lazy import lazy_face
from megatron_mosa.utils.libraries import drop_known_noise, drop_warnings, log_libraries
from megatron_mosa.utils.parsing import finite, is_plain, json_integer, load_json, parse_json
from megatron_mosa.utils.processors import usable_processors
from megatron_mosa.utils.progress import progress, say
from megatron_mosa.utils.records import known_values, read_record
from megatron_mosa.utils.tables import table_console
from megatron_mosa.utils.versions import versions
from megatron_mosa.utils.words import counted, decimals

__all__ = [
    "REPLACED",
    "counted",
    "creation_problem",
    "decimals",
    "drop_known_noise",
    "drop_warnings",
    "file_problem",
    "finite",
    "first_line",
    "free_megabytes",
    "is_plain",
    "json_integer",
    "known_values",
    "lazy_face",
    "load_json",
    "log_libraries",
    "naming",
    "parse_json",
    "progress",
    "read_record",
    "replace_directory",
    "say",
    "sync",
    "table_console",
    "tolerating",
    "usable_processors",
    "versions",
    "write_atomically",
]
