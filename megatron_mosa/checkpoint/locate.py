"""What lies at a path, a checkpoint of ours or of another program's, and a place to write another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from megatron_mosa.checkpoint.lifecycle import CheckpointStore
from megatron_mosa.checkpoint.safetensors_folder import INDEX
from megatron_mosa.errors import StorageError, UserError, nearest
from megatron_mosa.utils.files import replace_directory, sync

TRACKER = "latest_checkpointed_iteration.txt"


class Kind(Enum):
    """Who wrote a folder."""

    OURS = "megatron_mosa checkpoint"
    HUGGING_FACE = "Hugging Face model folder"
    DEEPSPEED = "DeepSpeed checkpoint"
    TORCH_DIST = "Megatron-LM torch_dist checkpoint"
    STATE_DICT = "folder of safetensors"


_REPLACEABLE = (Kind.OURS, Kind.HUGGING_FACE, Kind.TORCH_DIST, Kind.STATE_DICT)  # what an export or import writes


def kind_of(path: Path) -> Kind | None:
    """What kind of model a folder holds, by the names of its files; None: no kind that is known."""
    if (path / "metadata.json").is_file() and (path / "state").is_dir():
        return Kind.OURS
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
    """The folders of DeepSpeed's that hold model states: the folder itself, or those below it, newest last."""
    folders = [path, *sorted(entry for entry in path.iterdir() if entry.is_dir())] if path.is_dir() else []
    found = [folder for folder in folders if any(folder.glob("*_model_states.pt"))]
    return sorted(found, key=lambda folder: folder.stat().st_mtime)


def torch_dist_iteration(path: Path) -> Path | None:
    """The folder that Megatron-LM wrote a checkpoint into: the path itself, or the one below that was its newest."""
    tracker = path / TRACKER
    if tracker.is_file():
        name = tracker.read_text(errors="replace", encoding="utf-8").strip()
        path = path / (f"iter_{int(name):07d}" if name.isdecimal() else "release")
    return path if (path / ".metadata").is_file() and (path / "metadata.json").is_file() else None


def find_model(path: Path) -> tuple[Path, Kind]:
    """The folder meant by a path, and its kind; of a run directory or its ``checkpoints/`` the newest checkpoint.

    Raises:
        UserError: there is none.
    """
    kind = kind_of(path)
    if kind is not None:
        return path, kind
    for folder in (path / "checkpoints", path):
        if published := CheckpointStore(folder, keep_last=1).published():
            return published[-1], Kind.OURS
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"'{path}' does not exist{nearest(path.name, siblings)}; give the folder of a checkpoint")
    raise UserError(
        f"'{path}' holds no model; expected a checkpoint (metadata.json, state/), a run directory or its checkpoints/, "
        "a Hugging Face folder (config.json), a DeepSpeed checkpoint (*_model_states.pt), a Megatron-LM torch_dist "
        f"checkpoint ({TRACKER}, or .metadata and metadata.json), safetensors ({INDEX})"
    )


def find_model_of(kind: Kind, path: Path) -> Path:
    """The folder meant by a path, as ``find_model``, if it is of that kind.

    Raises:
        UserError: there is none, or one of another kind.
    """
    folder, found = find_model(path)
    if found is not kind:
        allowed = f"a {kind.value}" + (", or a run directory" if kind is Kind.OURS else "")
        raise UserError(f"'{path}' is a {found.value}; expected {allowed}")
    return folder


def refuse_target(target: Path, source: Path, *, force: bool) -> None:
    """Refuse a place that is taken, or cannot be written.

    Args:
        force: a model that lies there may be replaced; anything else may not.

    Raises:
        UserError: naming the place and what to do.
    """
    resolved, read = target.resolve(), source.resolve()
    if resolved == read or resolved in read.parents or read in resolved.parents:
        raise UserError(f"OUT={target} lies in, or holds, the source '{source}'; give a folder apart from it")
    existing = next(folder for folder in resolved.parents if os.path.lexists(folder))  # the others will be made
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "is not writable" if existing.is_dir() else "is not a directory"
        raise UserError(f"OUT={target}: '{existing}' {what}; give a new folder below one that can be written")
    if not os.path.lexists(target):
        return
    is_model = kind_of(target) in _REPLACEABLE
    if not force:
        fix = "give another folder, or --force to replace it" if is_model else "give another folder"
        raise UserError(f"OUT={target} exists; {fix}")
    if target.is_symlink() or not is_model:
        raise UserError(f"OUT={target} is no model folder, and --force replaces no other; give another folder")


@contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, renamed to it at the end; if that is not reached nothing is left behind.

    Parents of ``target`` that are missing are made. A model that lies at ``target`` is there until the new one is
    complete.

    Raises:
        StorageError: the file system did not take it.
    """
    place = target.resolve()
    writing = place.with_name(f".writing-{place.name}")
    missing = [folder for folder in place.parents if not folder.exists()]  # the deepest first
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        yield writing
        for entry in (*writing.rglob("*"), writing):
            sync(entry)
        replace_directory(writing, place)
    except (OSError, StorageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"OUT={target} did not take it: {reason}; make room, or give another folder") from None
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        with suppress(OSError):  # not empty, or never made
            for folder in missing:
                folder.rmdir()
