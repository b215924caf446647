"""The output directory of a sweep: one sweep at a time, one request, and none of another card's results."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_mosa.errors import UserError
from megatron_mosa.tools.scaling.rows import Sweep, make_rows
from megatron_mosa.tools.scaling.session import all_results
from megatron_mosa.tools.scaling.sweep_request import Request
from megatron_mosa.utils import load_json, write_atomically

_REQUEST = "request.json"
_FOLDERS = ("jobs", "layouts", "logs")
_OWN = (*_FOLDERS, "results.csv", "results.md", "scaling.png", "breakdown.png", _REQUEST)
"""What a sweep writes. The request is removed last, so an interrupted removal still looks like a sweep."""


def prepare_output(folder: Path, identity: dict[str, Any], force: bool) -> None:
    """Create the output directory, or check that it holds an earlier part of the same sweep.

    Args:
        identity: sections of keys, as returned by ``Request.identity``.
        force: remove another sweep, or write next to files that no sweep wrote; these stay.

    Raises:
        UserError: it holds something else and ``force`` is not given, files that a sweep would overwrite though none
            wrote them, or it is not writable.
    """
    file = folder / _REQUEST
    identity = json.loads(json.dumps(identity))
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output={folder} is a file; give a directory")
        earlier = _earlier(file)
        if earlier is None:
            _refuse_foreign_files(folder, force)
        elif force:
            _remove(folder)
        elif difference := _difference(earlier, identity):
            raise UserError(
                f"--output={folder} holds another sweep: {difference}; give another --output, or --force to remove its "
                "results"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_atomically(file, json.dumps(identity, indent=1, allow_nan=False) + "\n")
        for name in _FOLDERS:
            (folder / name).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"could not write to --output={folder} ({error.strerror}); give another directory") from None


def _earlier(file: Path) -> dict[str, Any] | None:
    """Return what the sweep in a directory was asked for; None: no readable request shows that there was one."""
    try:
        found = load_json(file)
    except (FileNotFoundError, ValueError):
        return None
    sections = found if isinstance(found, dict) else {}
    return found if "request" in sections and all(isinstance(keys, dict) for keys in sections.values()) else None


def _refuse_foreign_files(folder: Path, force: bool) -> None:
    """Refuse a directory without a sweep if a sweep would overwrite its files, or without --force if it has any."""
    if _REQUEST in (taken := [name for name in _OWN if os.path.lexists(folder / name)]):
        raise UserError(f"--output={folder}: its {_REQUEST} is damaged or not that of a sweep; give another --output")
    if taken:
        raise UserError(
            f"--output={folder} holds {', '.join(taken)}, which no sweep wrote (there is no {_REQUEST}) and this one "
            "would overwrite; give another directory"
        )
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise UserError(
            f"--output={folder} is not empty and does not hold a sweep; give another directory, or --force to write "
            "next to what is there"
        )


def _remove(folder: Path) -> None:
    """Remove a sweep's own files: the directory may hold others."""
    for path in map(folder.joinpath, _OWN):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Name the first key in which two identities differ, with both values."""
    for section, values in ours.items():
        for key, value in values.items():
            other = theirs.get(section, {}).get(key)
            if other != value:
                name = f"--{key}" if section == "request" else f"{section}.{key}"
                return f"{name}={other}, now {value}"
    return ""


def read_sweep(folder: Path, request: Request, identity: dict[str, Any]) -> Sweep:
    """Read a finished sweep to compare with: of the same model and data, on another card or with other versions.

    Raises:
        UserError: there is none, or it measured something else.
    """
    try:
        ours = json.loads(json.dumps({key: value for key, value in identity.items() if key != "versions"}))
        theirs = load_json(folder / _REQUEST)
        difference, their_versions = _difference(theirs, ours), theirs["versions"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--beside={folder} does not hold a sweep; give the --output of another one") from None
    if difference:
        raise UserError(f"--beside={folder} measured something else: {difference}")
    batch = request.config.train.global_batch_size
    return Sweep(
        name=folder.name,
        sequence_length=request.config.data.sequence_length,
        global_batch=batch,
        weak=request.weak,
        precision=request.config.train.precision,
        rows=make_rows(all_results(folder), batch, request.weak, None),
        device=request.device,
        command="",
        versions=their_versions,
    )
