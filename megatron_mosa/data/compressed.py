"""Read compressed files: all of their content, or an error."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from pathlib import Path
from typing import BinaryIO, cast

_CHUNK = 1 << 16  # compressed bytes


def open_decompressed(file: Path) -> BinaryIO:
    """Open a file for reading; .gz, .bz2, .xz and .zst are decompressed. Damage raises what the decompressor raises."""
    match file.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(file))
        case ".bz2" | ".xz" as suffix:
            return cast(BinaryIO, io.BufferedReader(_Streams(file.open("rb"), is_xz=suffix == ".xz")))
        case ".zst":
            import pyarrow  # slow to import

            return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))
        case _:
            return file.open("rb")


class _Streams(io.RawIOBase):
    """The content of one or more .bz2 or .xz streams.

    bz2.open and lzma.open stop silently at anything else, such as a stream whose header is damaged.
    """

    def __init__(self, file: BinaryIO, *, is_xz: bool) -> None:
        self._file = file
        self._is_xz = is_xz
        self._stream = self._new_stream()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        content = b""
        while not content:
            if self._stream.eof:
                compressed = self._next_start()
                if not compressed:
                    return 0
                self._stream = self._new_stream()
            else:
                compressed = self._file.read(_CHUNK) if self._stream.needs_input else b""
                if self._stream.needs_input and not compressed:
                    raise EOFError("it ends within a compressed stream")
            content = self._stream.decompress(compressed, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _new_stream(self) -> bz2.BZ2Decompressor | lzma.LZMADecompressor:
        return lzma.LZMADecompressor() if self._is_xz else bz2.BZ2Decompressor()

    def _next_start(self) -> bytes:
        """Return bytes from the beginning of the next stream on; none at the end of the file."""
        data = self._stream.unused_data or self._file.read(_CHUNK)
        if not self._is_xz:
            return data
        zeros = 0  # between .xz streams and after the last, zeros by fours are padding
        while data and not data.strip(b"\0"):
            zeros += len(data)
            data = self._file.read(_CHUNK)
        start = data.lstrip(b"\0")
        if (zeros + len(data) - len(start)) % 4:
            raise lzma.LZMAError("the padding behind a stream is not a multiple of four bytes")
        return start
