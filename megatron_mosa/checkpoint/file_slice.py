"""Read a byte range of a file, and verify the checksums of torch.save archives."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any

from megatron_mosa.utils import progress

_BLOCK = 1 << 20


class FileSlice(io.RawIOBase):
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


def find_corruption(file: IO[bytes], advance: Callable[[int], object] = lambda _: None) -> str | None:
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


def find_corrupt_file(folder: Path, names: Collection[str]) -> str | None:
    """Verify the checksums of files of torch.save; name the first that is damaged or cannot be read, or return None."""
    sizes = (file.stat().st_size for name in names if (file := folder / name).is_file())
    with progress(sum(sizes), "verifying checksums") as bar:
        for name in names:
            try:
                with (folder / name).open("rb") as file:
                    damage = find_corruption(file, bar.update)
            except OSError as error:
                damage = f"cannot be read ({error.strerror})"
            if damage is not None:
                return f"{name} {damage}"
    return None
