"""Helpers without a subject of their own: atomic files, versions, progress bars, first lines of errors."""

from megatron_mosa.utils.errors import first_line
from megatron_mosa.utils.files import free_megabytes, replace_directory, sync, write_atomically
from megatron_mosa.utils.lazy import lazy_face
from megatron_mosa.utils.progress import progress
from megatron_mosa.utils.versions import versions

__all__ = [
    "first_line",
    "free_megabytes",
    "lazy_face",
    "progress",
    "replace_directory",
    "sync",
    "versions",
    "write_atomically",
]
