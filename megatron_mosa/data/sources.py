"""Documents out of the places named in ``data.sources``."""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_mosa.data.hub import HUB, HubSource
from megatron_mosa.data.left_out import BROKEN_LINKS, EMPTY, HIDDEN, NOT_UTF8, SEEN_AGAIN, mended
from megatron_mosa.data.tables import is_table, table_rows
from megatron_mosa.errors import UserError, nearest

STDLIB = "stdlib"

# Below the standard library: what pip installed, and tests, whose texts are tables and deliberate nonsense.
_STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_ENDS = 4096  # bytes at each end of a file that its state covers

Position = dict[str, Any]  # a place between two documents, in JSON types; only its own source understands it


class Source(Protocol):
    """An ordered sequence of documents that can be read from any place on."""

    name: str
    """As written in ``data.sources``."""

    passed_over: Counter[str]
    """What was left out when the source was opened; see ``left_out.py`` for the names."""

    left_out: Counter[str]
    """The same, and what the last ``read`` has left out or changed so far."""

    def describe(self) -> dict[str, Any]:
        """What tells two states of the source apart, with source, kind, files, and bytes (None: not known)."""
        ...

    def text_bytes(self) -> int | None:
        """Bytes of text, or None where only reading would tell."""
        ...

    def read(self, start: Position | None = None) -> Generator[tuple[str, Position]]:
        """Yield every document from ``start`` on, each with the place behind it; never an empty one.

        Every text can be encoded as UTF-8. A byte-order mark at the beginning of a file is not part of it.
        """
        ...

    def state(self, first: Position | None, last: Position | None) -> str:
        """A hash that changes when what lies between two places has changed.

        Raises:
            UserError: it cannot be read any more.
        """
        ...


def open_source(source: str, text_field: str, *, streaming: bool = True, timeout: float = 300.0) -> Source:
    """Find ``stdlib``, a file, a folder, or ``hf:NAME`` (see docs/data.md).

    Raises:
        UserError: there is no such thing.
    """
    if source.startswith(HUB):
        return HubSource(source, text_field, streaming=streaming, timeout=timeout)
    return FileSource(source, text_field)


def iter_documents(sources: Sequence[str], text_field: str) -> Iterator[str]:
    """Yield the non-empty documents of every source, in a fixed order, holding one file or batch in memory.

    Raises:
        UserError: whatever ``open_source`` refuses or reading the source finds.
    """
    for source in sources:
        for text, _ in open_source(source, text_field).read():
            yield text


class FileSource:
    """``stdlib``, a file, or a folder (read recursively, files and folders whose name starts with a dot left out).

    JSON and Parquet files give one document a row, out of column ``text_field``; any other file is one document.
    Links are followed, each folder is read once. Files that are not UTF-8 text are skipped in folders. Memory grows
    with the number of files, not with their size.

    Raises:
        UserError: no such file or folder.
    """

    def __init__(self, source: str, text_field: str) -> None:
        self.name = source
        self.text_field = text_field
        self.passed_over = Counter[str]()
        self._root, self._files = _find(source, self.passed_over)
        self.left_out = Counter(self.passed_over)

    def describe(self) -> dict[str, Any]:
        """The kind, files, bytes, and a hash of the names and sizes."""
        listing = hashlib.sha256()
        total = 0
        for file in self._files:
            size = file.stat().st_size
            name = file.name if file == self._root else file.relative_to(self._root).as_posix()
            listing.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
            total += size
        kind = STDLIB if self.name == STDLIB else "file" if self._root.is_file() else "folder"
        counts = {"files": len(self._files), "bytes": total}
        return {"source": self.name, "kind": kind, **counts, "listing": listing.hexdigest()}

    def text_bytes(self) -> int | None:
        """The size of the files; None where tables, whose text cannot be sized beforehand, are among them."""
        return None if any(map(is_table, self._files)) else sum(file.stat().st_size for file in self._files)

    def read(self, start: Position | None = None) -> Generator[tuple[str, Position]]:
        """See ``Source``.

        Raises:
            UserError: a missing column, broken JSON or Parquet, a named file that is not UTF-8 text.
        """
        self.left_out = Counter(self.passed_over)
        first, skip = (start["file"], start["row"]) if start else (0, 0)
        for number, file in enumerate(self._files[first:], start=first):
            if is_table(file):
                for row, text in enumerate(table_rows(file, self.text_field, skip), start=skip + 1):
                    if text:
                        yield mended(text, self.left_out), {"file": number, "row": row}
                    else:
                        self.left_out[EMPTY] += 1
            elif text := _read_text(file):
                yield text, {"file": number + 1, "row": 0}
            elif text is not None:
                self.left_out[EMPTY] += 1
            elif file == self._root:
                raise UserError(f"data.sources: {file} is not UTF-8 text; expected text, JSON lines, or Parquet")
            else:
                self.left_out[NOT_UTF8] += 1
            skip = 0

    def state(self, first: Position | None, last: Position | None) -> str:
        """A hash over size, time of change, first and last bytes of the files between two places."""
        begin = first["file"] if first else 0
        end = last["file"] + bool(last["row"]) if last else begin
        digest = hashlib.sha256()
        for file in self._files[begin:end]:
            try:
                with file.open("rb") as content:
                    status = os.fstat(content.fileno())
                    digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode() + content.read(_ENDS))
                    content.seek(max(0, status.st_size - _ENDS))
                    digest.update(content.read(_ENDS))
            except OSError as error:
                raise UserError(f"data.sources: cannot read {file}: {error.strerror}") from error
        return digest.hexdigest()


def _find(source: str, left_out: Counter[str]) -> tuple[Path, list[Path]]:
    """The root of a source and its files, sorted; for a single file both are that file."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [f for f in root.rglob("*.py") if not _STDLIB_EXCLUDED.intersection(f.relative_to(root).parts)]
        return root, sorted(files)
    root = Path(source).expanduser()
    try:
        if root.is_dir():
            return root, sorted(_files_below(root, left_out))
        if root.exists():
            return root, [root]
        siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
    except OSError as error:
        raise UserError(f"data.sources: cannot read {error.filename or source}: {error.strerror}") from error
    hint = nearest(source, [STDLIB]) or nearest(root.name, siblings)
    raise UserError(
        f"data.sources: '{source}' is neither '{STDLIB}' nor an existing file or folder{hint}; a Hugging Face dataset "
        f"is written {HUB}NAME"
    )


def _files_below(root: Path, left_out: Counter[str]) -> Iterator[Path]:
    """All files below a folder. Links are followed; a folder that several lead to is read once, so loops end."""

    def fail(error: OSError) -> None:
        raise error

    seen = {_identity(root)}
    for folder, below, names in os.walk(root, onerror=fail, followlinks=True):
        visible = sorted(name for name in below if not name.startswith("."))
        files = [Path(folder, name) for name in names if not name.startswith(".")]
        left_out[HIDDEN] += len(below) - len(visible) + len(names) - len(files)
        below.clear()  # in place: os.walk goes on with what is left in it
        for name in visible:
            identity = _identity(Path(folder, name))
            if identity in seen:
                left_out[SEEN_AGAIN] += 1
            else:
                seen.add(identity)
                below.append(name)
        for file in files:
            if file.is_file():
                yield file
            elif file.is_symlink() and not file.exists():
                left_out[BROKEN_LINKS] += 1


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _read_text(file: Path) -> str | None:
    """The file's text, or None when it is not UTF-8."""
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
        return content.decode("utf-8")  # not read_text: it would rewrite line ends
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"data.sources: cannot read {file}: {error.strerror}") from error
