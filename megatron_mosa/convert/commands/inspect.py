"""Describe a checkpoint or model folder, of megatron_mosa or of another program, without loading it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import cast

from megatron_mosa.checkpoint import (
    DamagedError,
    StateIndex,
    find_corrupt_file,
    find_damage,
    is_recorded,
    read_metadata,
)
from megatron_mosa.config import selection_in_words
from megatron_mosa.convert.formats.safetensors import SafetensorsFolder, read_json, shard_names
from megatron_mosa.convert.locate import (
    COMMON_FILE,
    COMMON_KEY,
    Kind,
    deepspeed_tag,
    deepspeed_tags,
    find_model,
    partition_keys,
    torch_dist_iteration,
)
from megatron_mosa.errors import RunError
from megatron_mosa.utils import counted, progress

_UNCHECKED = "not checked (--full verifies checksums)"
_SIZES_ONLY = "no file is missing or too short (--full also verifies checksums)"
_SHARD = re.compile(r"(.*?)(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)(.*)")


def inspect(path: Path, *, full: bool = False) -> None:
    """Print a description of the model at ``path``; for a run directory or its ``checkpoints/``, the newest checkpoint.

    Args:
        full: compare the hashes of all files in the manifest, not just their sizes.

    Raises:
        UserError: ``path`` holds no known kind of model.
        RunError: the model is damaged; the description, which includes the damage, is printed first.
    """
    folder, kind = find_model(path)
    describe = {
        Kind.MOSA: _ours,
        Kind.HUGGING_FACE: _hugging_face,
        Kind.DEEPSPEED: _deepspeed,
        Kind.TORCH_DIST: _torch_dist,
        Kind.STATE_DICT: _safetensors,
    }[kind]
    facts = {"path": str(folder), "kind": kind.value}
    damage = None
    try:
        damage = describe(folder, facts, full)
    except DamagedError as error:
        damage = str(error)
    facts["size"] = _bytes(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    if damage is not None:
        facts["health"] = f"damaged: {damage}"
    width = max(map(len, facts))
    print("\n".join(f"{name:{width}}  {fact}" for name, fact in facts.items()))
    if damage is not None:
        raise RunError(f"'{folder}' is damaged: {damage}")


# Each of the following adds lines to ``facts`` and returns a description of the damage, or None.


def _ours(folder: Path, facts: dict[str, str], full: bool) -> str | None:
    metadata = read_metadata(folder)
    model, mosa = metadata.config["model"], metadata.config["mosa"]
    fixed = f"{model['num_fixed_heads']} fixed, " if model.get("num_fixed_heads") else ""
    routing = f"{model['num_routing_heads']} Routing, " if model.get("num_routing_heads") else ""
    selection = selection_in_words(mosa.get("selection", "")) if mosa["num_heads"] else ""
    gated = "; dense and local heads are gated" if model.get("attention_gate") else ""
    facts["format"] = str(metadata.format_version)
    facts["model"] = (
        f"{counted(model['num_layers'], 'layer')} of width {model['hidden_size']}; heads: "
        f"{model['num_dense_heads']} dense, {model.get('num_local_heads', 0)} local, {fixed}"
        f"{routing}{mosa['num_heads']} MoSA{selection}{gated}"
    )
    facts["step"] = (
        f"{metadata.step:,} (optimizer step {metadata.optimizer_step:,}, "
        f"{counted(metadata.consumed_samples, 'sample')})"
    )
    sizes = (f"{name.replace('_', ' ')} {size}" for name, size in metadata.layout.items())
    facts["written at"] = ", ".join(sizes) or "one process (import)"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in sorted(metadata.versions.items()))
    # Check sizes first: the error from reading a truncated index says little.
    damage = find_damage(folder, reads_all=full) if metadata.has_manifest else None
    if damage is None:
        state = StateIndex(folder / "state")
        facts["parameters"] = _parameters(info.elements for info in state.weights.values())
        facts["optimizer state"] = "Adam's moments" if state.has_optimizer_state else "none"
        facts["health"] = _healthy(metadata.has_manifest, full)
    return damage


def _hugging_face(folder: Path, facts: dict[str, str], full: bool) -> str | None:
    content = read_json(folder / "config.json")
    facts["model"] = f"model_type {content.get('model_type')}, {_listed(content.get('architectures'))}"
    return _safetensors(folder, facts, full)


def _listed(names: object) -> str:
    return ", ".join(map(str, names)) if isinstance(names, list) else str(names or "")


def _safetensors(folder: Path, facts: dict[str, str], full: bool) -> str | None:
    has_manifest = is_recorded(folder, shard_names(folder))
    damage = find_damage(folder, reads_all=full) if has_manifest else None
    if damage is None:
        tensors = SafetensorsFolder(folder).tensors
        facts["parameters"] = _parameters(info.elements for info in tensors.values())
        facts["types"] = ", ".join(sorted({info.dtype for info in tensors.values()}))
        facts["health"] = _healthy(has_manifest, full, only_weights=True)
    return damage


def _deepspeed(folder: Path, facts: dict[str, str], full: bool) -> str | None:
    """Describe the tag that an export reads, by file names: the files are pickles, and are never unpickled."""
    facts["tags"] = ", ".join(tag.name for tag in deepspeed_tags(folder))
    tag = deepspeed_tag(folder)
    if (folder / "latest").is_file():
        facts["latest"] = tag.name
    names = sorted(file.name for file in tag.glob("*.pt"))
    for group, pattern in (("model-parallel", r"mp_rank_(\d+)"), ("ZeRO", r"zero_pp_rank_(\d+)")):
        ranks = {match[1] for name in names if (match := re.search(pattern, name))}
        facts[f"{group} ranks"] = str(len(ranks))
    damage = _missing_shard(names)
    if damage is None and full:
        damage = find_corrupt_file(tag, names)
    facts["health"] = f"all files of {tag.name} match their checksums" if full else _UNCHECKED
    return damage


def _torch_dist(folder: Path, facts: dict[str, str], full: bool) -> str | None:
    """Read the index only, unless ``full``."""
    iteration = cast(Path, torch_dist_iteration(folder))
    facts["iteration"] = iteration.name
    state = StateIndex(iteration)
    weights, optimizer = partition_keys(state.tensors)
    facts["parameters"] = _parameters(state.tensors[key].elements for key in weights)
    facts["types"] = ", ".join(sorted({state.tensors[key].dtype for key in weights}))
    facts["optimizer state"] = counted(len(optimizer), "tensor") if optimizer else "none"
    damage = state.find_missing()
    if damage is None and COMMON_KEY not in state.keys and not (iteration / COMMON_FILE).is_file():
        damage = f"{COMMON_FILE} is missing, which describes the model"
    if damage is not None:
        return damage
    if full:
        from megatron_mosa.checkpoint import StateReader  # imports torch

        tensors = StateReader(iteration, "")
        with progress(None, "verifying checksums") as bar:
            if damage := tensors.find_corruption(tensors.tensors.keys(), bar.update):
                return damage
    facts["health"] = "all tensors match their checksums" if full else _SIZES_ONLY
    return None


def _missing_shard(names: Sequence[str]) -> str | None:
    """Name a file that a rank of DeepSpeed did not write although others wrote theirs, by the files' names; or None.

    Of the ranks' numbers only the largest that any file has is known.
    """
    present: dict[tuple[str, bool, str], set[tuple[int, int]]] = {}  # ranks by what else is in a file's name
    for match in filter(None, map(_SHARD.fullmatch, names)):
        before, part, model, after = match.groups()
        present.setdefault((before, part is not None, after), set()).add((int(part or 0), int(model)))
    every = [ranks for found in present.values() for ranks in found]
    parts, models = (range(1 + max((ranks[place] for ranks in every), default=-1)) for place in (0, 1))
    for (before, is_partitioned, after), found in sorted(present.items()):
        for part, model in product(parts if is_partitioned else (0,), models):
            if (part, model) not in found:
                rank = f"zero_pp_rank_{part}_" if is_partitioned else ""
                return f"{before}{rank}mp_rank_{model:02}{after} is missing"
    return None


def _healthy(has_manifest: bool, full: bool, *, only_weights: bool = False) -> str:
    if not has_manifest:
        return "not checked: the checkpoint has no manifest"
    compared = "hashes" if full else "sizes"
    match = f"all {compared} of the weights match" if only_weights else f"all file {compared} match"
    return match if full else f"{match} (--full also compares hashes)"


def _parameters(elements: Iterable[int]) -> str:
    counts = list(elements)
    return f"{sum(counts):,} in {counted(len(counts), 'tensor')}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
