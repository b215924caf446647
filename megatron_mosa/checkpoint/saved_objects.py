"""Files of torch.save from elsewhere: read without running code of theirs, and checked by their checksums."""

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
    """Takes the place of an object whose class is known to be harmless and whose content is of no interest."""

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        """Whatever the arguments of the class are."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """As ``__new__``."""

    def __setstate__(self, state: Any) -> None:
        """What a pickle would set stays unset."""


def load_saved(file: Path | BytesIO, name: str, harmless: Collection[str], known: Collection[type] = ()) -> Any:
    """The object that torch.save wrote; tensors of a file are mapped from it.

    Args:
        file: where it lies.
        name: what to call it in errors.
        harmless: full names of classes, or with a dot at the end of packages, whose objects become a ``StandIn``.
        known: classes whose objects are made.

    Raises:
        DamagedError: it cannot be read, or asks for another class or function, which is not even imported.
    """
    prefixes = tuple(entry for entry in harmless if entry.endswith("."))
    try:
        with safe_globals([*known]):
            asked = get_unsafe_globals_in_checkpoint(file)
        stand_ins = [entry for entry in asked if entry in harmless or entry.startswith(prefixes)]
        if refused := sorted(set(asked) - set(stand_ins)):
            raise DamagedError(f"{name} asks for {refused[0]}: refused, nothing of it was run")
        if isinstance(file, BytesIO):
            file.seek(0)
        with safe_globals([*known, *((StandIn, entry) for entry in stand_ins)]):
            return torch.load(file, "cpu", weights_only=True, mmap=isinstance(file, Path))
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
    except DamagedError:
        raise
    except Exception as error:  # whatever a broken archive or pickle makes of itself
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DamagedError(f"{name} is damaged, or was not written by torch.save ({lines[0]})") from None


class Window(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As of any file; nothing behind the end of the range."""
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count


def find_change(file: IO[bytes], advance: Callable[[int], object] = lambda _: None) -> str | None:
    """What is wrong with an archive of torch.save by the CRC-32 of its records; None if nothing.

    Args:
        file: the archive and nothing else; all of it is read.
        advance: called with numbers of bytes that were read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                with archive.open(record) as stream:
                    while block := stream.read(_BLOCK):  # the end compares the checksum
                        advance(len(block))
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"is not what was written ({error})"
    return None
