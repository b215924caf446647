"""Detect the kind of model at a path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from megatron_mosa.checkpoint import DamagedError, published_checkpoints
from megatron_mosa.convert.formats.safetensors import INDEX
from megatron_mosa.errors import UserError, nearest_path

TRACKER = "latest_checkpointed_iteration.txt"
COMMON_FILE = "common.pt"
"""In an iteration of Megatron-LM's: everything that is not a tensor; from megatron-core 0.19 on it may be stored under
``COMMON_KEY`` instead."""

COMMON_KEY = "common_state/shard_0_1"
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


class Kind(Enum):
    """The kind of model that a folder holds."""

    MOSA = "megatron_mosa checkpoint"
    HUGGING_FACE = "Hugging Face model folder"
    DEEPSPEED = "DeepSpeed checkpoint"
    TORCH_DIST = "Megatron-LM torch_dist checkpoint"
    STATE_DICT = "safetensors folder"


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


def deepspeed_tag(path: Path) -> Path:
    """Return the tag folder of a DeepSpeed checkpoint: ``path`` itself, the one that ``latest`` names, or the newest.

    Raises:
        DamagedError: ``latest`` names a folder that is not there.
    """
    tags = deepspeed_tags(path)
    latest = path / "latest"
    if tags == [path] or not latest.is_file():
        return tags[-1]
    name = latest.read_text(errors="replace", encoding="utf-8").strip()
    if path / name not in tags:
        available = ", ".join(tag.name for tag in tags)
        raise DamagedError(f"latest names {name!r}, which is not a tag folder; available: {available}")
    return path / name


def torch_dist_iteration(path: Path) -> Path | None:
    """Return the iteration folder of a torch_dist checkpoint: ``path`` itself, or the newest according to the tracker.

    None if there is none.
    """
    tracker = path / TRACKER
    if tracker.is_file():
        name = tracker.read_text(errors="replace", encoding="utf-8").strip()
        path = path / (f"iter_{int(name):07d}" if name.isdecimal() else "release")
    return path if (path / ".metadata").is_file() and (path / "metadata.json").is_file() else None


def partition_keys(keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split the tensor keys of a Megatron-LM checkpoint into those of weights and those of optimizer state."""
    weights: list[str] = []
    optimizer: list[str] = []
    for key in keys:
        (optimizer if _OPTIMIZER.match(key) else weights).append(key)
    return weights, optimizer


def find_model(path: Path) -> tuple[Path, Kind]:
    """Return the model folder for a path, and its kind; a run directory or its ``checkpoints/`` means the newest one.

    Raises:
        UserError: ``path`` holds no model.
    """
    kind = detect_kind(path)
    if kind is not None:
        return path, kind
    for folder in (path / "checkpoints", path):
        if published := published_checkpoints(folder):
            return published[-1], Kind.MOSA
    if not path.exists():
        raise UserError(f"'{path}' does not exist{nearest_path(path)}; pass the folder of a checkpoint")
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        raise UserError(
            f"'{path}' is a run without a checkpoint yet; wait for its first one (checkpoint.interval), or pass another"
        )
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"'{path}' is a PEFT adapter, not a model; merge it first (merge_and_unload, then save_pretrained) and "
            "pass that folder"
        )
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
