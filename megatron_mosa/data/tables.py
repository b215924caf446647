"""The text column of JSON and Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mosa.data.json_rows import json_rows, open_plain
from megatron_mosa.errors import UserError, nearest
from megatron_mosa.utils import first_line

_LINES = (".jsonl", ".ndjson")
_JSON = (*_LINES, ".json")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_PARQUET = ".parquet"
_ROWS_WITHOUT = 1000  # so many rows without the text column, and none with it: its name is wrong


def _form(file: Path) -> str:
    """The suffix that says what is in the file, behind that of a compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in _JSON else ""
    return suffixes[-1] if suffixes else ""


def is_table(file: Path) -> bool:
    """Whether the file's name says that it has rows; any other file is one document."""
    return _form(file) in (*_JSON, _PARQUET)


def table_rows(file: Path, text_field: str, skip: int = 0) -> Iterator[str | None]:
    """The text column of one JSON or Parquet file, from row ``skip`` on; None or '' for rows without text.

    Raises:
        UserError: a file that cannot be read, or without a column of text of that name.
    """
    form = _form(file)
    try:
        if file.stat().st_size == 0:
            return
        if form == _PARQUET:
            yield from _parquet_rows(file, text_field, skip)
            return
        column = TextColumn(text_field, str(file))
        with open_plain(file) as content:
            for place, row in json_rows(content, str(file), is_lines=form in _LINES, skip=skip):
                yield column.text(row, place)
        column.end()
    except UserError:
        raise
    # pyarrow and the decompressors each raise their own; all mean a file that cannot be read.
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"data.sources: cannot read {file}: {reason}; repair or leave out the file") from error


class TextColumn:
    """The text of rows that are dictionaries, some of which may lack it."""

    def __init__(self, text_field: str, where: str) -> None:
        self._text_field = text_field
        self._where = where
        self._is_there = False
        self._names: dict[str, None] = {}  # of the columns, in order, until one is the text
        self._rows = 0

    def text(self, row: dict[str, Any], place: str) -> str | None:
        """The text of one row, None where it has none.

        Raises:
            UserError: naming ``place``: what is there is not text; or no row had the column so far, and those are many.
        """
        value = row.get(self._text_field)
        if not isinstance(value, str | None):
            others = ", ".join(map(str, row))
            raise UserError(
                f"data.text_field='{self._text_field}': {place} holds {type(value).__name__} there, not text; name a "
                f"column of strings, such as one of: {others}"
            )
        if not self._is_there:
            self._is_there = self._text_field in row
            self._names |= dict.fromkeys(row)
            self._rows += 1
            if self._rows >= _ROWS_WITHOUT:
                self.end()
        return value

    def end(self) -> None:
        """Of the rows.

        Raises:
            UserError: there were some, and none had the column.
        """
        if self._rows and not self._is_there:
            raise no_column(self._where, self._text_field, list(self._names))


def no_column(where: str, text_field: str, columns: list[str]) -> UserError:
    """The error of a file without the text column."""
    shown = columns[:8] + ([f"and {len(columns) - 8} more"] if len(columns) > 8 else [])
    return UserError(
        f"data.text_field='{text_field}' is not a column of {where}{nearest(text_field, columns)}; "
        f"its columns: {', '.join(shown)}"
    )


def _parquet_rows(file: Path, text_field: str, skip: int) -> Iterator[str | None]:
    import pyarrow.parquet as parquet  # slow to import, and of no use to a training process

    with parquet.ParquetFile(file) as table:
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise no_column(str(file), text_field, columns)
        column = TextColumn(text_field, str(file))
        groups, row = [], 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if skip >= rows and not groups:
                skip, row = skip - rows, row + rows
            else:
                groups.append(group)
        for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                if skip:
                    skip -= 1
                else:
                    yield column.text({text_field: value}, f"row {row} of {file}")
