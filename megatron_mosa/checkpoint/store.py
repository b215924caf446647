"""Save, publish, find and prune the checkpoints of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor
from torch import distributed as dist

from megatron_mosa.checkpoint.format import (
    read_state,
    reserve,
    snapshot,
    write_state,
)
from megatron_mosa.checkpoint.host_memory import HostMemory
from megatron_mosa.checkpoint.index import StateIndex
from megatron_mosa.checkpoint.manifest import DamagedError, files_below, find_damage, hash_files, write_manifest
from megatron_mosa.checkpoint.metadata import Metadata, published_checkpoints, read_metadata, write_metadata
from megatron_mosa.config import CheckpointSection, ModelSection, MosaSection
from megatron_mosa.data import TokenizerIdentity
from megatron_mosa.errors import StorageError, UserError
from megatron_mosa.parallel import on_every_rank, on_main_rank
from megatron_mosa.utils import REPLACED, replace_directory

if TYPE_CHECKING:
    from megatron_mosa.engine import TrainingEngine

_WRITING = ".writing-"
_DAMAGED = "damaged-"
# Keys of sections model and mosa that affect how a model is computed or trained, but not which model it is.
_MAY_DIFFER = ("backend", "capacity_factor", "threshold_ema", "threshold_warmup_steps", "balance_rate", "routing_decay")


class NewestCheckpoint(NamedTuple):
    """The checkpoint that a run resumes from."""

    path: Path | None
    """None: there are no checkpoints."""

    damaged: tuple[tuple[Path, str], ...]
    """Newer damaged checkpoints, newest first, each with a description of the damage."""


class CheckpointStore:
    """The folder ``checkpoints/`` of a run. Every rank must call the collective methods."""

    def __init__(
        self, folder: Path, keep_last: int, permanent_interval: int | None = None, keep_permanent: int | None = None
    ) -> None:
        """Set which checkpoints pruning keeps.

        Args:
            folder: the folder that holds the checkpoints.
            keep_last: number of newest checkpoints to keep, not counting permanent ones; at least 1.
            permanent_interval: checkpoints saved at multiples of this step are permanent; None: none are.
            keep_permanent: number of newest permanent checkpoints to keep; None: all.
        """
        self.folder = folder
        self.keep_last = keep_last
        self.permanent_interval = permanent_interval
        self.keep_permanent = keep_permanent
        self._writer: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._memory = HostMemory()
        self._last: Future[Any] | None = None
        self._saved_as_permanent: dict[Path, bool] = {}

    @classmethod
    def of(cls, directory: Path, section: CheckpointSection) -> CheckpointStore:
        """Create the store for a run directory, with the retention settings of its configuration."""
        return cls(directory / "checkpoints", section.keep_last, section.permanent_interval, section.keep_permanent)

    def published(self) -> list[Path]:
        """Return the checkpoints under their final names, oldest first."""
        return published_checkpoints(self.folder)

    def is_permanent(self, step: int) -> bool:
        """Whether a checkpoint of this step is saved as a permanent one, which ``keep_last`` spares."""
        return _is_multiple(step, self.permanent_interval)

    def newest(self, *, reads_all: bool = False) -> NewestCheckpoint:
        """Find the newest intact checkpoint, and report the damage of any newer ones.

        Args:
            reads_all: compare the hashes of all files, not just their sizes.

        Raises:
            UserError: all checkpoints are damaged, or one has a newer format.
        """
        newest = self._newest(self.published(), reads_all)
        if newest.path is None and newest.damaged:
            path, damage = newest.damaged[0]
            raise UserError(
                f"all checkpoints in '{self.folder}' are damaged; the newest is '{path.name}': {damage}; restore it, "
                "or move the folders away to start from step 0"
            )
        return newest

    def newest_before(self, step: int) -> NewestCheckpoint:
        """Find the newest intact checkpoint before a step, by file sizes alone; path None: there is none."""
        return self._newest([path for path in self.published() if _step(path) < step], reads_all=False)

    def _newest(self, paths: Sequence[Path], reads_all: bool) -> NewestCheckpoint:
        damaged: list[tuple[Path, str]] = []
        for path in reversed(paths):
            damage = _damage(path, reads_all)
            if damage is None:
                return NewestCheckpoint(path, tuple(damaged))
            damaged.append((path, damage))
        return NewestCheckpoint(None, tuple(damaged))

    def set_aside(self, path: Path) -> Path:
        """Rename a damaged checkpoint so that it is ignored from now on; call on the main rank only."""
        target = self.folder / f"{_DAMAGED}{path.name}"
        shutil.rmtree(target, ignore_errors=True)
        os.rename(path, target)
        return target

    def save(self, engine: TrainingEngine, metadata: Metadata) -> Path:
        """Save and publish a checkpoint, and return its folder; collective.

        Raises:
            StorageError: on every rank, if any rank failed to write; nothing is published or pruned.
        """
        return self.begin_save(engine, metadata).result()

    def prepare(self, engine: TrainingEngine) -> None:
        """Allocate the host memory for saves in the writer thread while training starts; collective."""
        self._last = self._start_writer().submit(reserve, engine, self._memory)

    def begin_save(self, engine: TrainingEngine, metadata: Metadata) -> Future[Path]:
        """Copy the state to host memory and publish it from the writer thread; collective.

        Saves do not overlap: this call waits for the previous save to finish or fail. The future's result is what
        ``save`` returns or raises.
        """
        writer = self._start_writer()
        self.wait()  # the previous save still reads from the memory that this snapshot overwrites
        saving = self._last = writer.submit(self._publish, snapshot(engine, self._memory), metadata)
        return saving

    def _start_writer(self) -> ThreadPoolExecutor:
        if self._writer is None:
            # A separate group: its collectives run concurrently with those of training.
            self._writer = ThreadPoolExecutor(1, "checkpoint")
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        return self._writer

    def wait(self) -> None:
        """Wait until the current save has been published or has failed."""
        if self._last is not None:
            wait([self._last])

    def close(self) -> None:
        """Wait for the current save; call before the process groups are destroyed."""
        if self._writer is not None:
            self._writer.shutdown()

    def _publish(self, state: dict[str, Tensor], metadata: Metadata) -> Path:
        """Write to a temporary folder, publish it with one rename, then prune."""
        group = self._group
        final = self.folder / f"step-{metadata.step:08d}"
        writing = self.folder / (_WRITING + final.name)

        def reserve() -> None:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)

        def describe() -> list[str]:
            write_metadata(metadata, writing)
            return files_below(writing)

        def publish() -> None:
            write_manifest(writing, {name: record for part in parts for name, record in part.items()})
            replace_directory(writing, final)
            self._prune()

        try:
            on_main_rank(reserve, group)
            write_state(state, writing, group)
            names = on_main_rank(describe, group)
            parts = on_every_rank(lambda: hash_files(writing, names[dist.get_rank() :: dist.get_world_size()]), group)
            on_main_rank(publish, group)
        except StorageError:
            on_main_rank(lambda: shutil.rmtree(writing, ignore_errors=True), group)
            raise
        return final

    def load(self, engine: TrainingEngine, path: Path) -> None:
        """Load a published checkpoint into the engine; collective."""
        read_state(engine, path, read_metadata(path).optimizer_step)

    def _stays_permanent(self, path: Path) -> bool:
        """Whether a checkpoint is permanent by the present interval, or by that with which it was saved."""
        step = _step(path)
        if path not in self._saved_as_permanent:
            interval = None
            with suppress(DamagedError, UserError, OSError):
                interval = read_metadata(path).config.get("checkpoint", {}).get("permanent_interval")
            self._saved_as_permanent[path] = _is_multiple(step, interval)
        return self.is_permanent(step) or self._saved_as_permanent[path]

    def _prune(self) -> None:
        """Remove old checkpoints, best effort: the next save retries what cannot be removed now."""
        published = self.published()
        permanent = [path for path in published if self._stays_permanent(path)]
        others = [path for path in published if path not in permanent]
        surplus = others[: -self.keep_last] + (permanent[: -self.keep_permanent] if self.keep_permanent else [])
        leftovers = [*self.folder.glob(_WRITING + "*"), *self.folder.glob(REPLACED + "*")]
        for path in [*surplus, *leftovers]:
            shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_multiple(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _damage(path: Path, reads_all: bool) -> str | None:
    """Describe the damage of a published checkpoint; None if it is intact.

    Raises:
        UserError: the format is newer, which is not damage: the checkpoint must not be skipped.
    """
    try:
        metadata = read_metadata(path)
    except DamagedError as error:
        return str(error)
    return find_damage(path, reads_all=reads_all) if metadata.has_manifest else None


def check_same_model(metadata: Metadata, path: Path, config: dict, data: dict) -> None:
    """Refuse a checkpoint whose model, seed, sequence length, tokenizer or dataset differs from the run's.

    Raises:
        UserError: names the first key that differs, both values and the fix.
    """
    fix = "choose another run name (run.name=...) or restore the setting"
    # A key missing from the checkpoint was added later; its default, or this, describes the model of that time.
    meant_by_them, meant_by_us = _meant_by_null(metadata.config), _meant_by_null(config)
    for section, defaults in {"model": ModelSection(), "mosa": MosaSection(load_feedback=0.0)}.items():
        for key, ours in config[section].items():
            theirs = metadata.config[section].get(key, getattr(defaults, key))
            if (theirs is None) != (ours is None):
                theirs = meant_by_them.get(key) if theirs is None else theirs
                ours = meant_by_us.get(key) if ours is None else ours
            _require_same(f"{section}.{key}", theirs, ours, path, fix, key in _MAY_DIFFER)
    _require_same("run.seed", metadata.config["run"]["seed"], config["run"]["seed"], path, fix)
    _require_same(
        "data.sequence_length", metadata.config["data"]["sequence_length"], config["data"]["sequence_length"], path, fix
    )
    key = "data.blend" if config["data"].get("blend") else "data.path"
    if not metadata.tokenizer.is_same(TokenizerIdentity.recorded(data)):
        hashes = metadata.data["tokenizer_hash"], data["tokenizer_hash"]
        _require_same(key, *hashes, path, fix, what="tokenizer hash")
    fingerprints = metadata.data["fingerprint"], data["fingerprint"]
    if fingerprints[0] != fingerprints[1]:  # by another name, or else built anew under the same one
        name = key.removeprefix("data.")
        _require_same(key, metadata.config["data"].get(name), config["data"][name], path, fix)
    _require_same(key, *fingerprints, path, fix, what="dataset fingerprint")


def check_resumable(path: Path) -> None:
    """Refuse a checkpoint of weights alone, as ``--drop-optimizer``, imports and ``causalize`` make them.

    Raises:
        UserError: it has no optimizer state, or its index is damaged.
    """
    try:
        if StateIndex(path / "state").has_optimizer_state:
            return
    except DamagedError as error:
        raise UserError(f"checkpoint '{path}' cannot be read: {error}; restore it, or move it away") from None
    raise UserError(
        f"checkpoint '{path}' has no optimizer state, so a run cannot resume from it; move it out of its run, and "
        "start one from its weights: run.name=NEW checkpoint.initialize_from=CHECKPOINT"
    )


def _meant_by_null(config: dict) -> dict[str, int]:
    """Return what null stands for, by key of section ``model``, as kinds of heads read it from a ``Config``."""
    length, sparsity = config["data"]["sequence_length"], config["mosa"]["sparsity"]
    return {
        "num_query_groups": config["model"]["num_dense_heads"],
        "local_window": min(max(int(length / sparsity), 2), length),
        "fixed_stride": int(sparsity),
        "routing_clusters": int(sparsity),
    }


def _require_same(
    key: str, theirs: object, ours: object, path: Path, fix: str, may_differ: bool = False, what: str = ""
) -> None:
    if theirs != ours and not may_differ:
        asked = f"{key} has {what} {ours}" if what else f"{key}={ours}"
        raise UserError(f"{asked}, but checkpoint '{path}' was written with {theirs}; {fix}")
