"""Rows of JSON files. Only the text column is looked at: other fields may hold anything, and vary from row to row."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_mosa.errors import UserError

_CHUNK = 1 << 20  # bytes
_LITERAL = 16  # characters at the end of a part of a file that may be half of a word or of an escape


def open_plain(file: Path) -> BinaryIO:
    """Open a file for reading, decompressing .gz, .bz2, .xz and .zst."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import pyarrow  # slow to import

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(suffix, open)(file, "rb")


def json_rows(content: BinaryIO, where: str, *, is_lines: bool, skip: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON file from number ``skip`` on, each with its place for error messages.

    Of a key that is given twice the last value counts. A byte-order mark at the beginning is left out.

    Args:
        where: the file's name.
        is_lines: one object a line, blank lines left out; False: objects one after the other, or in one array.

    Raises:
        UserError: what is not UTF-8, not JSON or not an object, by its line.
    """
    rows = _lines(content, where, skip) if is_lines else _values(content, where, skip)
    for line, value in rows:
        if not isinstance(value, dict):
            raise _bad(where, line, f"is {json.dumps(value)[:40]}, not an object")
        yield f"line {line} of {where}", value


def parse_line(line: bytes) -> Any:
    """The JSON value of one line.

    Raises:
        ValueError: it is not UTF-8, or not JSON.
    """
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError("is not JSON that can be read (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None


def _bad(where: str, line: int, what: str) -> UserError:
    return UserError(f"data.sources: line {line} of {where} {what}; repair the line or leave out the file")


def _lines(content: BinaryIO, where: str, skip: int) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content, start=1):
        line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
        if not line:
            continue
        if skip:
            skip -= 1
            continue
        try:
            yield number, parse_line(line)
        except ValueError as error:
            raise _bad(where, number, str(error)) from None


def _values(content: BinaryIO, where: str, skip: int) -> Iterator[tuple[int, Any]]:
    """Values of any layout, or the elements of an array of them. Memory grows with the longest, not with the file."""
    reader = _Reader(content, where)
    is_array = reader.next_character() == "["
    if is_array:
        reader.take(1)
    while (character := reader.next_character()) not in ("", "]"):
        line, value = reader.value()
        if skip:
            skip -= 1
        else:
            yield line, value
        character = reader.next_character()
        if is_array and character == ",":
            reader.take(1)
        elif is_array and character not in ("", "]"):
            raise _bad(where, reader.line, "is not JSON (a comma or ] is expected between the elements of an array)")
    if is_array and character == "]":
        reader.take(1)
    if is_array and (character != "]" or reader.next_character() != ""):
        raise _bad(where, reader.line, "is not JSON (the array does not end with the file)")
    if not is_array and character == "]":
        raise _bad(where, reader.line, "is not JSON (an object is expected)")


class _Reader:
    """Takes JSON values off the front of a file."""

    def __init__(self, content: BinaryIO, where: str) -> None:
        self.line = 1
        self._content = content
        self._where = where
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = json.JSONDecoder()
        self._text = ""
        self._at_end = False

    def _read(self, size: int) -> None:
        data = self._content.read(size)
        self._at_end = not data
        try:
            self._text += self._decoder.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n") + data[: error.start].count(b"\n")
            raise _bad(self._where, line, f"is not UTF-8 ({error.reason})") from None

    def take(self, characters: int) -> None:
        """Drop that many characters."""
        self.line += self._text.count("\n", 0, characters)
        self._text = self._text[characters:]

    def next_character(self) -> str:
        """The next one that is not white space, which is dropped; '' at the end."""
        while True:
            self.take(len(self._text) - len(self._text.lstrip()))
            if self._text or self._at_end:
                return self._text[:1]
            self._read(_CHUNK)

    def value(self) -> tuple[int, Any]:
        """The next value, and its line."""
        line = self.line
        while True:
            try:
                value, end = self._parser.raw_decode(self._text)
            except RecursionError:
                raise _bad(self._where, line, "is not JSON that can be read (nested too deeply)") from None
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated") or error.pos + _LITERAL > len(self._text)
                if self._at_end or not cut_off:
                    raise _bad(self._where, line + error.lineno - 1, f"is not JSON ({error.msg})") from None
            else:
                if end < len(self._text) or self._at_end:  # a number may go on
                    self.take(end)
                    return line, value
            self._read(max(_CHUNK, len(self._text)))  # twice as much each time, so that long values take linear time
