"""Read JSON objects from files of any size. Only the text column matters: other fields may vary from row to row."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatron_mosa.errors import UserError
from megatron_mosa.utils import json_integer, parse_json

_CHUNK = 1 << 20  # bytes
_MAX_LITERAL = 16  # an error in so many last characters of a chunk may be a literal or escape cut in two
_SPACE = re.compile(r"\s*")


def json_rows(content: BinaryIO, name: str, *, is_lines: bool, skip: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a JSON file after the first ``skip``, each with its location for error messages.

    The last of several values of one key counts. A leading byte-order mark is ignored.

    Args:
        content: the open file.
        name: the file's name, for error messages.
        is_lines: one object per line, blank lines ignored; False: objects one after the other, or in one array.
        skip: number of objects to skip.

    Raises:
        UserError: a line is not UTF-8, not JSON or not an object.
    """
    rows = _lines(content, name, skip) if is_lines else _values(content, name, skip)
    for line, value in rows:
        if not isinstance(value, dict):
            raise _line_error(name, line, f"is {json.dumps(value)[:40]}, not an object")
        yield f"line {line} of {name}", value


def parse_line(line: bytes) -> Any:
    """Return the JSON value of one line.

    Raises:
        ValueError: the line is not UTF-8, or not JSON; the message continues a sentence that starts with its name.
    """
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None


def _line_error(name: str, line: int, problem: str) -> UserError:
    return UserError(f"data.sources: line {line} of {name} {problem}; repair the line or remove the file")


def _lines(content: BinaryIO, name: str, skip: int) -> Iterator[tuple[int, Any]]:
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
            raise _line_error(name, number, str(error)) from None


def _values(content: BinaryIO, name: str, skip: int) -> Iterator[tuple[int, Any]]:
    """Yield values in any layout, or the elements of an array. Memory grows with the longest value, not the file."""
    reader = _Reader(content, name)
    is_array = reader.next_character() == "["
    if is_array:
        reader.advance(1)
    while (character := reader.next_character()) not in ("", "]"):
        line, value = reader.value()
        if skip:
            skip -= 1
        else:
            yield line, value
        character = reader.next_character()
        if is_array and character == ",":
            reader.advance(1)
        elif is_array and character not in ("", "]"):
            raise _line_error(name, reader.line, "is not JSON (expected a comma or ] after an element of the array)")
    if is_array and character == "]":
        reader.advance(1)
    if is_array and (character != "]" or reader.next_character() != ""):
        raise _line_error(name, reader.line, "is not JSON (the array does not end with the file)")
    if not is_array and character == "]":
        raise _line_error(name, reader.line, "is not JSON (expected an object)")


class _Reader:
    """Parses JSON values one after the other from a file that is read in chunks."""

    def __init__(self, content: BinaryIO, name: str) -> None:
        self.line = 1
        self._content = content
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = json.JSONDecoder(parse_int=json_integer)
        self._text = ""
        self._start = 0  # of what is not consumed yet: dropping every value from the text would copy the rest each time
        self._at_end = False

    def _read(self, size: int) -> None:
        data = self._content.read(size)
        self._at_end = not data
        try:
            self._text = self._text[self._start :] + self._decoder.decode(data, final=self._at_end)
            self._start = 0
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n", self._start) + data[: error.start].count(b"\n")
            raise _line_error(self._name, line, f"is not UTF-8 ({error.reason})") from None

    def advance(self, characters: int) -> None:
        self._advance_to(self._start + characters)

    def _advance_to(self, end: int) -> None:
        self.line += self._text.count("\n", self._start, end)
        self._start = end

    def next_character(self) -> str:
        """Skip white space and return the next character without consuming it; '' at the end."""
        while True:
            space = _SPACE.match(self._text, self._start)
            assert space is not None  # it matches everywhere
            self._advance_to(space.end())
            if self._start < len(self._text) or self._at_end:
                return self._text[self._start : self._start + 1]
            self._read(_CHUNK)

    def value(self) -> tuple[int, Any]:
        """Consume the next value; return its line and the value."""
        line = self.line
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self._start)
            except RecursionError:
                raise _line_error(self._name, line, "is not JSON that can be read (nested too deeply)") from None
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos + _MAX_LITERAL > len(self._text)
                if self._at_end or not is_cut:
                    line += self._text.count("\n", self._start, error.pos)
                    raise _line_error(self._name, line, f"is not JSON ({error.msg})") from None
            else:
                if end < len(self._text) or self._at_end:  # a number at the end of a chunk may continue in the next
                    self._advance_to(end)
                    return line, value
            self._read(max(_CHUNK, len(self._text) - self._start))  # twice as much each time, for linear time
