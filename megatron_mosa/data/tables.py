"""Rows of JSON lines and Parquet files."""

from __future__ import annotations

import glob
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mosa.errors import UserError, nearest

_JSON = (".jsonl", ".json", ".ndjson")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_PARQUET = ".parquet"


def is_table(file: Path) -> bool:
    """Whether the file's name says that it has rows; any other file is one document."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        return bool(suffixes) and suffixes[-1] in _JSON
    return bool(suffixes) and suffixes[-1] in (*_JSON, _PARQUET)


def table_rows(file: Path, text_field: str, skip: int = 0) -> Iterator[str | None]:
    """The text column of one JSON or Parquet file, from row ``skip`` on; None or '' for rows without text.

    Raises:
        UserError: a file that cannot be parsed, or without a column of text of that name.
    """
    with tempfile.TemporaryDirectory() as scratch:  # load_dataset leaves lock files in its cache folder
        try:
            if file.stat().st_size == 0:
                return
            for row in _open_table(file, text_field, skip, scratch):
                yield row_text(row, text_field, str(file))
        except UserError:
            raise
        # pyarrow, pandas, fsspec and the decompressors each raise their own; all mean a file that cannot be read.
        except Exception as error:
            where = _first_bad_line(file) or str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(f"data.sources: cannot read {file}: {where}; repair or leave out the file") from error


def row_text(row: dict[str, Any], text_field: str, where: str) -> str | None:
    """The text of one row, or None where it has none.

    Raises:
        UserError: no such column, or one that does not hold text; it names ``where``.
    """
    if text_field not in row:
        raise _no_column(where, text_field, list(row))
    value = row[text_field]
    if not isinstance(value, str | None):
        raise UserError(
            f"data.text_field='{text_field}': {where} holds {type(value).__name__} there, not text; name a "
            f"column of strings, such as one of: {', '.join(map(str, row))}"
        )
    return value


def _open_table(file: Path, text_field: str, skip: int, scratch: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet  # both slow to import, and of no use to a training process
    from datasets import load_dataset

    options: dict[str, Any] = {"parse_agent_traces": False}
    form = "json"
    if file.suffix.lower() == _PARQUET:
        columns = parquet.read_schema(file).names
        if text_field not in columns:
            raise _no_column(str(file), text_field, columns)
        form, options = "parquet", {"columns": [text_field]}
    name = glob.escape(str(file))  # data_files are glob patterns
    rows: Any = load_dataset(form, data_files=[name], split="train", streaming=True, cache_dir=scratch, **options)
    return iter(rows.skip(skip) if skip else rows)


def _no_column(where: str, text_field: str, columns: list[str]) -> UserError:
    shown = columns[:8] + ([f"and {len(columns) - 8} more"] if len(columns) > 8 else [])
    return UserError(
        f"data.text_field='{text_field}' is no column of {where}{nearest(text_field, columns)}; "
        f"its columns: {', '.join(shown)}"
    )


def _first_bad_line(file: Path) -> str:
    """Where the first line that is not JSON stands (the parsers count from the start of a block)."""
    if file.suffix.lower() not in (".jsonl", ".ndjson"):
        return ""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line) if line.strip() else None
                except ValueError as error:
                    return f"line {number} is not JSON ({error})"
    except OSError:
        pass
    return ""
