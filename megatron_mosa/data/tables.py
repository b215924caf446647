"""Read the text column of JSON and Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mosa.data.compressed import open_decompressed
from megatron_mosa.data.json_rows import json_rows
from megatron_mosa.errors import UserError, nearest
from megatron_mosa.utils import first_line

_LINES = (".jsonl", ".ndjson")
_JSON = (*_LINES, ".json")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_PARQUET = ".parquet"
_MAX_ROWS_WITHOUT_TEXT = 1000  # if none of so many first rows has the text column, its name is wrong


def _format(file: Path) -> str:
    """Return the suffix that names the file's format, without that of a compression; '' if there is none."""
    *_, inner, outer = ("", "", *map(str.lower, file.suffixes))
    if outer in _COMPRESSED:
        return inner if inner in _JSON else ""
    return outer


def is_table(file: Path) -> bool:
    """Return whether the file's name says that it has rows; any other file is one document."""
    return _format(file) in (*_JSON, _PARQUET)


def table_rows(file: Path, text_field: str, skip: int = 0) -> Iterator[str | None]:
    """Yield the text column of a JSON or Parquet file after the first ``skip`` rows; None or '' for rows without text.

    Raises:
        UserError: the file cannot be read, or has no text column of that name.
    """
    file_format = _format(file)
    try:
        if file.stat().st_size == 0:
            return
        if file_format == _PARQUET:
            yield from _parquet_rows(file, text_field, skip)
            return
        column = TextColumn(text_field, str(file), is_found=skip > 0)  # documents end at rows with text
        with open_decompressed(file) as content:
            for location, row in json_rows(content, str(file), is_lines=file_format in _LINES, skip=skip):
                yield column.text(row, location)
        column.check_found()
    except UserError:
        raise
    # pyarrow and the decompressors each raise their own; all mean a file that cannot be read.
    except Exception as error:
        reason, fix = first_line(error), "repair or remove the file"
        if "too much memory" in reason:  # of a .zst file with a window above 128 MiB
            fix = "decompress it (zstd -d --long=31), or compress it again without --long"
        raise UserError(f"data.sources: could not read {file}: {reason}; {fix}") from error


class TextColumn:
    """Extracts the text of rows, which are dictionaries, and notices if none of them has the text column.

    Args:
        text_field: the name of the column.
        source: what has the rows, for error messages.
        is_found: a row that was read earlier had the column.
    """

    def __init__(self, text_field: str, source: str, *, is_found: bool = False) -> None:
        self._text_field = text_field
        self._source = source
        self._is_found = is_found
        self._columns: dict[str, None] = {}  # seen so far, in order, until one is the text
        self._rows = 0

    def text(self, row: dict[str, Any], location: str) -> str | None:
        """Return the text of one row, None if it has none.

        Raises:
            UserError: the value at ``location`` is not text, or none of many first rows had the column.
        """
        value = row.get(self._text_field)
        if not isinstance(value, str | None):
            strings = [str(name) for name, other in row.items() if isinstance(other, str)]
            fix = f"set it to a column of text: {', '.join(strings[:8])}" if strings else "write the column as strings"
            raise UserError(
                f"data.text_field='{self._text_field}': {location} has type {type(value).__name__} in this column, "
                f"not text; {fix}"
            )
        if not self._is_found:
            self._is_found = self._text_field in row
            self._columns |= dict.fromkeys(row)
            self._rows += 1
            if self._rows >= _MAX_ROWS_WITHOUT_TEXT:
                self.check_found()
        return value

    def check_found(self) -> None:
        """Check that a row had the column, if there were any rows.

        Raises:
            UserError: none had it.
        """
        if self._rows and not self._is_found:
            raise missing_column(self._source, self._text_field, list(self._columns))


def missing_column(source: str, text_field: str, columns: list[str]) -> UserError:
    """Return the error for a source without the text column."""
    shown = columns[:8] + ([f"and {len(columns) - 8} more"] if len(columns) > 8 else [])
    fix = f"its columns: {', '.join(shown)}; name one of them, or keep" if shown else "it has no columns; keep"
    return UserError(
        f"data.text_field='{text_field}' is not a column of {source}{nearest(text_field, columns)}; {fix} the file out "
        "of the source"
    )


def _parquet_rows(file: Path, text_field: str, skip: int) -> Iterator[str | None]:
    import pyarrow.parquet as parquet  # slow to import, and not needed in training

    with parquet.ParquetFile(file, page_checksum_verification=True) as table:
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise missing_column(str(file), text_field, columns)
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
