"""Load torch.save files of other programs without running their code."""

from __future__ import annotations

from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_mosa.checkpoint import DamagedError


class Placeholder:
    """Placeholder for an object whose class is known to be harmless and whose content is not needed."""

    def __new__(cls, *_: Any, **__: Any) -> Placeholder:
        """Accept and ignore any arguments of the original class."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Accept and ignore any arguments of the original class."""

    def __setstate__(self, state: Any) -> None:
        """Ignore the pickled state."""


def safe_load(file: Path | BytesIO, name: str, harmless: Collection[str], known: Collection[type] = ()) -> Any:
    """Load an object that torch.save wrote; tensors of a file on disk are memory-mapped.

    Args:
        file: a path, or the content of a file.
        name: name of the file in error messages.
        harmless: full names of classes, or of packages (with a trailing dot), whose objects become a ``Placeholder``.
        known: classes that may be instantiated.

    Raises:
        DamagedError: the file cannot be read, or refers to any other class or function, which is not even imported.
    """
    prefixes = tuple(entry for entry in harmless if entry.endswith("."))
    try:
        with safe_globals([*known]):
            unsafe = get_unsafe_globals_in_checkpoint(file)
        placeholders = [entry for entry in unsafe if entry in harmless or entry.startswith(prefixes)]
        if refused := sorted(set(unsafe) - set(placeholders)):
            raise DamagedError(f"{name} refers to {refused[0]}; refused to load it, no code was run")
        if isinstance(file, BytesIO):
            file.seek(0)
        with safe_globals([*known, *((Placeholder, entry) for entry in placeholders)]):
            return torch.load(file, "cpu", weights_only=True, mmap=isinstance(file, Path))
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
    except DamagedError:
        raise
    except Exception as error:  # a broken archive or pickle can raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DamagedError(f"{name} is damaged, or was not written by torch.save ({lines[0]})") from None
