"""Read documents from the files, folders and datasets named in ``data.sources``."""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_mosa.config import expanded
from megatron_mosa.data.hub import HUB, HubSource, refuse_saved_dataset
from megatron_mosa.data.left_out import ALREADY_READ, BROKEN_LINKS, EMPTY, HIDDEN, NOT_UTF8, replace_surrogates
from megatron_mosa.data.tables import is_table, table_rows
from megatron_mosa.errors import UserError, nearest, nearest_path

STDLIB = "stdlib"

# Left out of the standard library: installed packages, and tests, whose texts are tables and deliberate nonsense.
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_STATE_BYTES = 4096  # at each end of a file, hashed to detect changes

Position = dict[str, Any]  # a point between two documents, in JSON types; only its own source understands it


class Source(Protocol):
    """An ordered sequence of documents that can be read from any position."""

    name: str
    """As written in ``data.sources``."""

    left_out_at_open: Counter[str]
    """What was left out when the source was opened, by the names of ``left_out.py``."""

    left_out: Counter[str]
    """The same, plus what the latest ``read`` has left out or changed so far."""

    def describe(self) -> dict[str, Any]:
        """Return source, kind, files, bytes (None: unknown) and a hash that differs when the source has changed."""
        ...

    def text_bytes(self) -> int | None:
        """Return the bytes of text, or None if they are unknown before reading."""
        ...

    def read(self, start: Position | None = None) -> Generator[tuple[str, Position]]:
        """Yield every non-empty document after ``start``, each with the position behind it.

        Every text can be encoded as UTF-8. A byte-order mark at the beginning of a file is not part of the text.
        """
        ...

    def state(self, first: Position | None, last: Position | None) -> str:
        """Return a hash that differs when the content between two positions has changed.

        Raises:
            UserError: it cannot be read any more.
        """
        ...


def open_source(source: str, text_field: str, *, streaming: bool = True, timeout: float = 300.0) -> Source:
    """Open ``stdlib``, a file, a folder, or ``hf:NAME`` (see docs/data.md).

    Raises:
        UserError: the source does not exist.
    """
    if source.startswith(HUB):
        return HubSource(source, text_field, streaming=streaming, timeout=timeout)
    return FileSource(source, text_field)


def iter_documents(sources: Sequence[str], text_field: str) -> Iterator[str]:
    """Yield the non-empty documents of every source, in a fixed order.

    Raises:
        UserError: a source does not exist, or cannot be read.
    """
    for source in sources:
        for text, _ in open_source(source, text_field).read():
            yield text


def total_text_bytes(sources: Sequence[Source]) -> int | None:
    """Return the bytes of text of all sources, or None if one does not know its own."""
    sizes = [source.text_bytes() for source in sources]
    return None if None in sizes else sum(size or 0 for size in sizes)


class FileSource:
    """``stdlib``, a file, or a folder, which is read recursively without names that start with a dot.

    JSON and Parquet files contain one document per row, in column ``text_field``; any other file is one document.
    Links are followed, but each folder is read once. In folders, files that are not UTF-8 are skipped. Memory grows
    with the number of files, not with their size.

    Raises:
        UserError: the file or folder does not exist.
    """

    def __init__(self, source: str, text_field: str) -> None:
        self.name = source
        self.text_field = text_field
        self.left_out_at_open = Counter[str]()
        self._root, self._files = _find(source, self.left_out_at_open)
        self._real_root = Path(os.path.realpath(self._root))
        self.left_out = Counter(self.left_out_at_open)

    def would_read(self, path: Path) -> bool:
        """Return whether a file or those in a folder, given without links, would be documents of this source."""
        root = self._real_root
        if self.name == STDLIB or path == root or not path.is_relative_to(root):
            return False
        return not any(part.startswith(".") for part in path.relative_to(root).parts)

    def contains(self, other: FileSource) -> bool:
        """Return whether all documents of another source are also documents of this one."""
        return other._real_root == self._real_root or self.would_read(other._real_root)

    def describe(self) -> dict[str, Any]:
        """Return kind, number of files, bytes, and a hash of names and sizes."""
        listing = hashlib.sha256()
        total = 0
        for file in self._files:
            size = file.stat().st_size
            name = file.name if file == self._root else file.relative_to(self._root).as_posix()
            listing.update(os.fsencode(name) + f"\0{size}\n".encode())
            total += size
        kind = STDLIB if self.name == STDLIB else "file" if self._root.is_file() else "folder"
        counts = {"files": len(self._files), "bytes": total}
        return {"source": self.name, "kind": kind, **counts, "listing": listing.hexdigest()}

    def text_bytes(self) -> int | None:
        """Return the size of the files, or None if there are tables, which contain more than text."""
        return None if any(map(is_table, self._files)) else sum(file.stat().st_size for file in self._files)

    def read(self, start: Position | None = None) -> Generator[tuple[str, Position]]:
        """See ``Source``.

        Raises:
            UserError: a column is missing, JSON or Parquet is invalid, or a file named as a source is not UTF-8.
        """
        self.left_out = Counter(self.left_out_at_open)
        first, skip = (start["file"], start["row"]) if start else (0, 0)
        for number, file in enumerate(self._files[first:], start=first):
            if is_table(file):
                for row, text in enumerate(table_rows(file, self.text_field, skip), start=skip + 1):
                    if text:
                        yield replace_surrogates(text, self.left_out), {"file": number, "row": row}
                    else:
                        self.left_out[EMPTY] += 1
            elif text := _read_text(file):
                yield text, {"file": number + 1, "row": 0}
            elif text is not None:
                self.left_out[EMPTY] += 1
            elif file == self._root:
                raise UserError(f"data.sources: {file} is not UTF-8 text; pass text, JSON Lines or Parquet")
            else:
                self.left_out[NOT_UTF8] += 1
            skip = 0

    def state(self, first: Position | None, last: Position | None) -> str:
        """Return a hash of size, modification time, first and last bytes of the files between two positions."""
        begin = first["file"] if first else 0
        end = last["file"] + bool(last["row"]) if last else begin
        digest = hashlib.sha256()
        for file in self._files[begin:end]:
            try:
                with file.open("rb") as content:
                    status = os.fstat(content.fileno())
                    digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode() + content.read(_STATE_BYTES))
                    content.seek(max(0, status.st_size - _STATE_BYTES))
                    digest.update(content.read(_STATE_BYTES))
            except OSError as error:
                raise _unreadable(file, error) from error
        return digest.hexdigest()


def _unreadable(path: object, error: OSError) -> UserError:
    return UserError(f"data.sources: could not read {path}: {error.strerror}; make it readable, or remove the source")


def _find(source: str, left_out: Counter[str]) -> tuple[Path, list[Path]]:
    """Return the root of a source and its sorted files; for a single file, both are that file."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in root.rglob("*.py") if not _STDLIB_EXCLUDED.intersection(f.relative_to(root).parts)]
        return root, sorted(files, key=_in_order)
    root = expanded("data.sources", source)
    try:
        refuse_saved_dataset(source, root)
        if root.is_dir():
            return root, sorted(_files_below(root, left_out), key=_in_order)
        if root.exists() and not root.is_file():
            raise UserError(f"data.sources: '{source}' is neither a file nor a folder; name files of text")
        if root.exists():
            return root, [root]
    except OSError as error:
        raise _unreadable(error.filename or source, error) from error
    hint = nearest(source, [STDLIB]) or nearest_path(source)
    raise UserError(
        f"data.sources: '{source}' is neither '{STDLIB}' nor an existing file or folder{hint}; write a Hugging Face "
        f"dataset as {HUB}NAME"
    )


def _files_below(root: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Yield all files below a folder. Links are followed, but each folder is read once, so that loops end."""

    def fail(error: OSError) -> None:
        raise error

    seen = {_inode(root)}
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        visible = sorted(name for name in subfolders if not name.startswith("."))
        files = [Path(folder, name) for name in names if not name.startswith(".")]
        left_out[HIDDEN] += len(subfolders) - len(visible) + len(names) - len(files)
        subfolders.clear()  # in place, because os.walk descends into what remains in it
        for name in visible:
            inode = _inode(Path(folder, name))
            if inode in seen:
                left_out[ALREADY_READ] += 1
            else:
                seen.add(inode)
                subfolders.append(name)
        for file in files:
            if file.is_file():
                yield file
            elif file.is_symlink() and not file.exists():
                left_out[BROKEN_LINKS] += 1


def _in_order(file: Path) -> list[bytes]:
    """Return what sorts files alike in every locale, which decides how names are read."""
    return [os.fsencode(part) for part in file.parts]


def _inode(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _read_text(file: Path) -> str | None:
    """Return the file's text, or None if it is not UTF-8."""
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
        return content.decode("utf-8")  # not read_text, which would change line endings
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise _unreadable(file, error) from error
