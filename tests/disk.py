"""Simulation of power failures: what a disk would hold, recorded before each rename, removal and fsync of a test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Moment:
    """The state of a directory just before an operation; ``copy`` is a copy as programs would have seen it."""

    operation: str
    copy: Path
    lost: frozenset[str]
    """Files, by their paths in the directory, whose content or directory entry had not been synced."""

    pending: tuple[tuple[str, str], ...]
    """Renames whose target directory had not been synced since."""


class Disk:
    """Context manager that records one directory while the functions that change it are called."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder = folder
        self.copies = copies
        self.moments: list[Moment] = []
        self._content: dict[int, tuple[int, int]] = {}  # size and modification time of synced files, by inode
        self._entries: set[tuple[int, str]] = set()  # synced entries: inode of the directory, and name
        self._pending: list[tuple[str, str]] = []
        self._busy = False  # in an operation, which may call others
        self._patches = pytest.MonkeyPatch()
        for path in (folder, *folder.rglob("*")):  # synced long ago
            self._note(path)

    def __enter__(self) -> Disk:
        for module, name, around in (
            (os, "rename", self._rename), (os, "replace", self._rename), (os, "fsync", self._fsync),
            (os, "unlink", self._remove), (os, "rmdir", self._remove), (shutil, "rmtree", self._remove),
        ):  # fmt: skip
            self._patches.setattr(module, name, self._patched(getattr(module, name), around))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.undo()
        self._take("the end")

    def states(self) -> Iterator[tuple[str, Path]]:
        """Yield a description and a directory for each moment: after a kill, and after two kinds of power failure."""
        for number, moment in enumerate(self.moments):
            yield f"killed before {moment.operation}", moment.copy
            for kind in ("all names", "no names"):  # which of the unsynced names are on the disk
                state = self.copies / f"{number}-{kind.replace(' ', '-')}"
                shutil.copytree(moment.copy, state)
                for name in moment.lost:
                    content = (state / name).read_bytes()
                    (state / name).write_bytes(content[: len(content) // 2])
                if kind == "no names":
                    for source, target in reversed(moment.pending):
                        if (state / target).exists() and not (state / source).exists():
                            os.rename(state / target, state / source)
                yield f"no power before {moment.operation}, {kind}", state

    def _patched(self, original: Callable[..., Any], around: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return original(*args, **kwargs)
            self._busy = True
            try:
                return around(original, *args, **kwargs)
            finally:
                self._busy = False

        return patched

    def _rename(self, original: Callable[..., Any], source: Any, target: Any) -> None:
        names = self._name(source), self._name(target)
        self._take(f"rename {names[0]} {names[1]}")
        original(source, target)
        if None not in names:
            self._pending.append(names)  # type: ignore[arg-type]

    def _fsync(self, original: Callable[..., Any], descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self._take(f"fsync {self._name(path)}")
        original(descriptor)
        self._note(path)
        if path.is_dir():
            self._pending = [names for names in self._pending if (self.folder / names[1]).parent != path]

    def _remove(self, original: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> None:
        self._take(f"removal of {self._name(path)}")
        original(path, *args, **kwargs)

    def _name(self, path: Any) -> str | None:
        path = Path(path)
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else None

    def _note(self, path: Path) -> None:
        """Record that a file or directory is on the disk now."""
        status = path.stat()
        if path.is_dir():
            self._entries |= {(status.st_ino, name) for name in os.listdir(path)}
        else:
            self._content[status.st_ino] = (status.st_size, status.st_mtime_ns)

    def _take(self, operation: str) -> None:
        lost = set()
        for path in self.folder.rglob("*"):
            status, name = path.stat(), str(path.relative_to(self.folder))
            if path.is_dir():
                continue
            is_entered = all(  # except the directory's own entries, which are ``pending``
                (parent.parent.stat().st_ino, parent.name) in self._entries
                for parent in (path, *path.parents)
                if parent.is_relative_to(self.folder) and parent.parent.is_relative_to(self.folder / name.split("/")[0])
            )
            if self._content.get(status.st_ino) != (status.st_size, status.st_mtime_ns) or not is_entered:
                lost.add(name)
        copy = self.copies / f"{len(self.moments)}-seen"
        shutil.copytree(self.folder, copy)
        self.moments.append(Moment(operation, copy, frozenset(lost), tuple(self._pending)))
