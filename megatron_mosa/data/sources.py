"""Documents out of the places named in ``data.sources``."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import logging
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from datasets import load_dataset

from megatron_mosa.errors import UserError, nearest

STDLIB = "stdlib"

_JSON = (".jsonl", ".json", ".ndjson")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_PARQUET = ".parquet"
# Below the standard library: what pip installed, and tests, whose texts are tables and deliberate nonsense.
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def iter_documents(sources: Sequence[str], text_field: str) -> Iterator[str]:
    """Yield the non-empty documents of every source, in a fixed order, holding one file or batch in memory.

    A source is ``stdlib``, a file, or a folder (read recursively, files and folders whose name starts with a
    dot left out). JSON lines and Parquet give one document a row, out of column ``text_field``; any other file
    is one document. Files that are not UTF-8 text are skipped in folders.

    Raises:
        UserError: a missing path or column, broken JSON or Parquet, a named file that is not UTF-8 text.
    """
    for source in sources:
        root, files = _files(source)
        skipped = []
        for file in files:
            if _is_table(file):
                yield from filter(None, _table_documents(file, text_field))
                continue
            text = _read_text(file)
            if text:
                yield text
            elif text is None and file == root:
                raise UserError(f"data.sources: {file} is not UTF-8 text; legal: text, JSON lines, or Parquet")
            elif text is None:
                skipped.append(file)
        if skipped:
            _warn_once(f"{source}: skipped {len(skipped)} files that are not UTF-8 text, such as {skipped[0]}")


def describe_source(source: str) -> dict[str, Any]:
    """What tells two states of a source apart: its kind, files, bytes, and a hash of the names and sizes.

    Raises:
        UserError: the source does not exist.
    """
    root, files = _files(source)
    listing = hashlib.sha256()
    total = 0
    for file in files:
        size = file.stat().st_size
        name = file.name if file == root else file.relative_to(root).as_posix()
        listing.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        total += size
    kind = STDLIB if source == STDLIB else "file" if root.is_file() else "folder"
    return {"source": source, "kind": kind, "files": len(files), "bytes": total, "listing": listing.hexdigest()}


def text_bytes(sources: Sequence[str]) -> int | None:
    """Bytes of text in the sources, or None where tables, whose text cannot be sized beforehand, are among them."""
    files = [file for source in sources for file in _files(source)[1]]
    return None if any(map(_is_table, files)) else sum(file.stat().st_size for file in files)


def _files(source: str) -> tuple[Path, list[Path]]:
    """The root of a source and its files, sorted; for a single file both are that file."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in root.rglob("*.py") if not _STDLIB_EXCLUDED.intersection(f.relative_to(root).parts)]
        return root, sorted(files)
    root = Path(source).expanduser()
    try:
        if root.is_dir():
            files = [f for f in root.rglob("*") if f.is_file() and not _is_hidden(f.relative_to(root))]
            return root, sorted(files)
        if root.exists():
            return root, [root]
        siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
    except OSError as error:
        raise UserError(f"data.sources: cannot read {source}: {error.strerror}") from error
    hint = nearest(source, [STDLIB]) or nearest(root.name, siblings)
    raise UserError(
        f"data.sources: '{source}' is neither '{STDLIB}' nor an existing file or folder{hint}; Hugging Face dataset "
        "names are not supported yet: download the dataset and give the path of its files"
    )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_table(file: Path) -> bool:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        return bool(suffixes) and suffixes[-1] in _JSON
    return bool(suffixes) and suffixes[-1] in (*_JSON, _PARQUET)


def _read_text(file: Path) -> str | None:
    """The file's text, or None when it is not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8")  # not read_text: it would rewrite line ends
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"data.sources: cannot read {file}: {error.strerror}") from error


def _table_documents(file: Path, text_field: str) -> Iterator[str | None]:
    """The text column of one JSON or Parquet file, row by row; None or '' for rows without text."""
    with tempfile.TemporaryDirectory() as scratch:  # load_dataset leaves lock files in its cache folder
        try:
            if file.stat().st_size == 0:
                return
            for row in _open_table(file, text_field, scratch):
                if text_field not in row:
                    raise _no_column(file, text_field, list(row))
                value = row[text_field]
                if not isinstance(value, str | None):
                    raise UserError(
                        f"data.text_field='{text_field}': {file} holds {type(value).__name__} there, not text; name a "
                        f"column of strings, such as one of: {', '.join(map(str, row))}"
                    )
                yield value
        except UserError:
            raise
        # pyarrow, pandas, fsspec and the decompressors each raise their own; all mean a file that cannot be read.
        except Exception as error:
            where = _first_bad_line(file) or str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(f"data.sources: cannot read {file}: {where}; repair or leave out the file") from error


def _open_table(file: Path, text_field: str, scratch: str) -> Iterator[dict[str, Any]]:
    options: dict[str, Any] = {"parse_agent_traces": False}
    form = "json"
    if file.suffix.lower() == _PARQUET:
        columns = parquet.read_schema(file).names
        if text_field not in columns:
            raise _no_column(file, text_field, columns)
        form, options = "parquet", {"columns": [text_field]}
    name = glob.escape(str(file))  # data_files are glob patterns
    return iter(load_dataset(form, data_files=[name], split="train", streaming=True, cache_dir=scratch, **options))


def _no_column(file: Path, text_field: str, columns: list[str]) -> UserError:
    return UserError(
        f"data.text_field='{text_field}' is no column of {file}{nearest(text_field, columns)}; "
        f"its columns: {', '.join(columns)}"
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


@functools.cache
def _warn_once(message: str) -> None:
    """The corpus is read once for the tokenizer and once for the tokens; its warnings belong on the screen once."""
    logging.getLogger(__name__).warning(message)
