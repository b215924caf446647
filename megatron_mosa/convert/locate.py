"""Detect the kind of model at a path, and create the target folder of a conversion atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from megatron_mosa.checkpoint.store import CheckpointStore
from megatron_mosa.convert.formats.safetensors import INDEX
from megatron_mosa.errors import StorageError, UserError, nearest
from megatron_mosa.utils.files import replace_directory, sync

TRACKER = "latest_checkpointed_iteration.txt"


class Kind(Enum):
    """The kind of model that a folder holds."""

    MOSA = "megatron_mosa checkpoint"
    HUGGING_FACE = "Hugging Face model folder"
    DEEPSPEED = "DeepSpeed checkpoint"
    TORCH_DIST = "Megatron-LM torch_dist checkpoint"
    STATE_DICT = "safetensors folder"


_REPLACEABLE = (Kind.MOSA, Kind.HUGGING_FACE, Kind.TORCH_DIST, Kind.STATE_DICT)  # kinds that conversions write


def detect_kind(path: Path) -> Kind | None:
    """Detect what kind of model a folder holds from its file names; None if unknown."""
    if (path / "metadata.json").is_file() and (path / "state").is_dir():
        return Kind.MOSA
    if (path / "config.json").is_file():
        return Kind.HUGGING_FACE
    if (path / INDEX).is_file():
        return Kind.STATE_DICT
    if torch_dist_iteration(path) is not None:
        return Kind.TORCH_DIST
    if deepspeed_tags(path):
        return Kind.DEEPSPEED
    return None


def deepspeed_tags(path: Path) -> list[Path]:
    """Return the DeepSpeed tag folders (``path`` itself or its subfolders) that hold model states, newest last."""
    folders = [path, *sorted(entry for entry in path.iterdir() if entry.is_dir())] if path.is_dir() else []
    found = [folder for folder in folders if any(folder.glob("*_model_states.pt"))]
    return sorted(found, key=lambda folder: folder.stat().st_mtime)


def torch_dist_iteration(path: Path) -> Path | None:
    """Return the iteration folder of a torch_dist checkpoint: ``path`` itself, or the newest according to the tracker.

    None if there is none.
    """
    tracker = path / TRACKER
    if tracker.is_file():
        name = tracker.read_text(errors="replace", encoding="utf-8").strip()
        path = path / (f"iter_{int(name):07d}" if name.isdecimal() else "release")
    return path if (path / ".metadata").is_file() and (path / "metadata.json").is_file() else None


def find_model(path: Path) -> tuple[Path, Kind]:
    """Return the model folder for a path, and its kind; a run directory or its ``checkpoints/`` means the newest one.

    Raises:
        UserError: ``path`` holds no model.
    """
    kind = detect_kind(path)
    if kind is not None:
        return path, kind
    for folder in (path / "checkpoints", path):
        if published := CheckpointStore(folder, keep_last=1).published():
            return published[-1], Kind.MOSA
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"'{path}' does not exist{nearest(path.name, siblings)}; pass the folder of a checkpoint")
    raise UserError(
        f"'{path}' does not contain a model; pass a checkpoint (metadata.json, state/), a run directory or its "
        "checkpoints/, a Hugging Face folder (config.json), a DeepSpeed checkpoint (*_model_states.pt), a Megatron-LM "
        f"torch_dist checkpoint ({TRACKER}, or .metadata and metadata.json), or safetensors ({INDEX})"
    )


def find_model_of(kind: Kind, path: Path) -> Path:
    """Return the model folder for a path like ``find_model``, but accept only one kind.

    Raises:
        UserError: ``path`` holds no model, or one of another kind.
    """
    folder, found = find_model(path)
    if found is not kind:
        expected = f"a {kind.value}" + (" or a run directory" if kind is Kind.MOSA else "")
        raise UserError(f"'{path}' is a {found.value}; pass {expected}")
    return folder


def check_target(target: Path, source: Path, *, force: bool) -> None:
    """Refuse a target that exists or cannot be written to.

    Args:
        force: allow replacing an existing model; nothing else may be replaced.

    Raises:
        UserError: names the target and the fix.
    """
    resolved, source_path = target.resolve(), source.resolve()
    if resolved == source_path or resolved in source_path.parents or source_path in resolved.parents:
        raise UserError(f"OUT={target} is inside the source '{source}' or contains it; choose a separate folder")
    existing = next(folder for folder in resolved.parents if os.path.lexists(folder))  # missing ones are created
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not writable" if existing.is_dir() else "is not a directory"
        raise UserError(f"OUT={target}: '{existing}' {reason}; choose a new folder in a writable directory")
    if not os.path.lexists(target):
        return
    is_model = detect_kind(target) in _REPLACEABLE
    if not force:
        fix = "choose another folder, or pass --force to replace it" if is_model else "choose another folder"
        raise UserError(f"OUT={target} already exists; {fix}")
    if target.is_symlink() or not is_model:
        raise UserError(
            f"OUT={target} is not a model folder, and --force replaces only model folders; choose another folder"
        )


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``target``; rename it to ``target`` on success, and remove it on failure.

    Creates missing parents of ``target``. An existing model at ``target`` stays in place until the new one is complete.

    Raises:
        StorageError: writing failed.
    """
    final = target.resolve()
    writing = final.with_name(f".writing-{final.name}")
    missing = [folder for folder in final.parents if not folder.exists()]  # deepest first
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        yield writing
        for entry in (*writing.rglob("*"), writing):
            sync(entry)
        replace_directory(writing, final)
    except (OSError, StorageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"could not write to OUT={target}: {reason}; free disk space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        with suppress(OSError):  # not empty, or never created
            for folder in missing:
                folder.rmdir()
