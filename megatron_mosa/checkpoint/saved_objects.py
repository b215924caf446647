"""Load torch.save files of other programs without running their code, and verify their checksums."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Collection
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_mosa.checkpoint.manifest import DamagedError

_BLOCK = 1 << 20


class StandIn:
    """Placeholder for an object whose class is known to be harmless and whose content is not needed."""

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        """Accept and ignore any arguments of the original class."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Accept and ignore any arguments of the original class."""

    def __setstate__(self, state: Any) -> None:
        """Ignore the pickled state."""


def load_saved(file: Path | BytesIO, name: str, harmless: Collection[str], known: Collection[type] = ()) -> Any:
    """Load an object that torch.save wrote; tensors of a file on disk are memory-mapped.

    Args:
        file: a path, or the content of a file.
        name: name of the file in error messages.
        harmless: full names of classes, or of packages (with a trailing dot), whose objects become a ``StandIn``.
        known: classes that may be instantiated.

    Raises:
        DamagedError: the file cannot be read, or refers to any other class or function, which is not even imported.
    """
    prefixes = tuple(entry for entry in harmless if entry.endswith("."))
    try:
        with safe_globals([*known]):
            unsafe = get_unsafe_globals_in_checkpoint(file)
        stand_ins = [entry for entry in unsafe if entry in harmless or entry.startswith(prefixes)]
        if refused := sorted(set(unsafe) - set(stand_ins)):
            raise DamagedError(f"{name} refers to {refused[0]}; refused to load it, no code was run")
        if isinstance(file, BytesIO):
            file.seek(0)
        with safe_globals([*known, *((StandIn, entry) for entry in stand_ins)]):
            return torch.load(file, "cpu", weights_only=True, mmap=isinstance(file, Path))
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
    except DamagedError:
        raise
    except Exception as error:  # a broken archive or pickle can raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DamagedError(f"{name} is damaged, or was not written by torch.save ({lines[0]})") from None


class Window(io.RawIOBase):
    """A byte range of a file, as a read-only file object."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        """Return True: a range can be read."""
        return True

    def seekable(self) -> bool:
        """Return True: a range supports ``seek``."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset relative to the start of the range, the current position, or the end of the range."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read at most to the end of the range; return the number of bytes read."""
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._position)])
        self._position += count
        return count


def find_change(file: IO[bytes], advance: Callable[[int], object] = lambda _: None) -> str | None:
    """Verify the CRC-32 of every record of a torch.save archive; describe the first mismatch, or return None.

    Args:
        file: the archive and nothing else; it is read completely.
        advance: called with the number of bytes just read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                with archive.open(record) as stream:
                    while block := stream.read(_BLOCK):  # reading to the end verifies the checksum
                        advance(len(block))
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"is corrupt ({error})"
    return None
