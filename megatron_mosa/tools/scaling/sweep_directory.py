"""The output directory of a sweep: one sweep at a time, one request, and none of another card's results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_mosa.errors import UserError
from megatron_mosa.tools.scaling.rows import Sweep, make_rows
from megatron_mosa.tools.scaling.session import all_results
from megatron_mosa.tools.scaling.sweep_request import Request
from megatron_mosa.utils import load_json, write_atomically

_OWN = (
    "request.json", "results.csv", "results.md", "scaling.png", "breakdown.png", "jobs", "layouts", "logs",
)  # fmt: skip


def prepare_output(folder: Path, identity: dict[str, Any], force: bool) -> None:
    """Create the output directory, or check that it holds an earlier part of the same sweep.

    Args:
        identity: sections of keys, as returned by ``Request.identity``.

    Raises:
        UserError: it holds something else and ``force`` is not given, or it is not writable.
    """
    file = folder / "request.json"
    identity = json.loads(json.dumps(identity))
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output={folder} is a file; give a directory")
        if folder.is_dir() and any(folder.iterdir()) and not force:
            _refuse_another(folder, file, identity)
        if force:  # remove only a sweep's own files: the directory may hold others
            for path in map(folder.joinpath, _OWN):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for name in ("jobs", "layouts", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_atomically(file, json.dumps(identity, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"could not write to --output={folder} ({error.strerror}); give another directory") from None


def _refuse_another(folder: Path, file: Path, identity: dict[str, Any]) -> None:
    fix = "give another --output, or --force to remove its results"
    if not file.is_file():
        raise UserError(
            f"--output={folder} is not empty and does not hold a sweep; give another directory, or --force to write "
            "next to what is there"
        )
    try:
        difference = _difference(load_json(file), identity)
    except (ValueError, AttributeError):
        raise UserError(f"--output={folder}: its request.json is damaged; {fix}") from None
    if difference:
        raise UserError(f"--output={folder} holds another sweep: {difference}; {fix}")


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
        theirs = load_json(folder / "request.json")
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
