"""Files of torch.save from elsewhere: read without running code of theirs, and checked by their checksums."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Collection
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


def load_saved(path: Path, harmless: Collection[str], known: Collection[type] = ()) -> dict[str, Any]:
    """The object of a file of torch.save, its tensors mapped from the file.

    Args:
        path: the file.
        harmless: full names of classes whose objects become a ``StandIn``.
        known: classes whose objects are made.

    Raises:
        DamagedError: it cannot be read, holds no dictionary, or asks for another class, which is not even imported.
    """
    allowed = [*known, *((StandIn, name) for name in harmless)]
    try:
        with safe_globals(allowed):
            if unsafe := sorted(get_unsafe_globals_in_checkpoint(path)):
                raise DamagedError(f"{path.name} asks for {unsafe[0]}: refused, nothing of it was run")
            content = torch.load(path, "cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from None
    except DamagedError:
        raise
    except Exception as error:  # whatever a broken archive or pickle makes of itself
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DamagedError(f"{path.name} is damaged, or no file of torch.save ({lines[0]})") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path.name} holds a {type(content).__name__}, no dictionary")
    return content


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
