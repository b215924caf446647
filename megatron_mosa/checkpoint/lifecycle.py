"""Writing, publishing, pruning and finding the checkpoints of a run."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor
from torch import distributed as dist

from megatron_mosa.checkpoint.format import (
    Metadata,
    read_metadata,
    read_state,
    reserve,
    snapshot,
    write_metadata,
    write_state,
)
from megatron_mosa.checkpoint.host_memory import HostMemory
from megatron_mosa.checkpoint.manifest import DamagedError, digests, files_below, find_damage, write_manifest
from megatron_mosa.config.schema import CheckpointSection, ModelSection, MosaSection
from megatron_mosa.data.tokenizer import TokenizerIdentity
from megatron_mosa.errors import StorageError, UserError
from megatron_mosa.parallel import on_every_rank, on_main_rank
from megatron_mosa.utils.files import sync

if TYPE_CHECKING:
    from megatron_mosa.engine import TrainingEngine

_NAME = re.compile(r"step-(\d{8,})")
_WRITING = ".writing-"
_DAMAGED = "damaged-"
# Of sections model and mosa, what says how a model is computed or trained, not which it is.
_MAY_DIFFER = ("backend", "capacity_factor", "threshold_ema", "threshold_warmup_steps")


class Newest(NamedTuple):
    """Where a run goes on from."""

    path: Path | None
    """None: there are no checkpoints."""

    damaged: tuple[tuple[Path, str], ...]
    """Newer ones that are not sound, newest first, and what is wrong with each."""


class CheckpointStore:
    """The folder ``checkpoints/`` of a run. Collective methods must be called by every rank."""

    def __init__(
        self, folder: Path, keep_last: int, permanent_interval: int | None = None, keep_permanent: int | None = None
    ) -> None:
        """Keep the last ``keep_last``, and of those at multiples of ``permanent_interval`` all or the last some."""
        self.folder = folder
        self.keep_last = keep_last
        self.permanent_interval = permanent_interval
        self.keep_permanent = keep_permanent
        self._writer: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._memory = HostMemory()
        self._last: Future[Any] | None = None

    @classmethod
    def of(cls, directory: Path, section: CheckpointSection) -> CheckpointStore:
        """The checkpoints of a run directory."""
        return cls(directory / "checkpoints", section.keep_last, section.permanent_interval, section.keep_permanent)

    def published(self) -> list[Path]:
        """Checkpoints under their final names, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def is_permanent(self, step: int) -> bool:
        """Whether a checkpoint of that step stays when later ones come."""
        return self.permanent_interval is not None and step % self.permanent_interval == 0

    def newest(self, *, reads_all: bool = False) -> Newest:
        """The newest sound checkpoint, and what is wrong with those that are newer.

        Args:
            reads_all: compare hashes of all files, not sizes alone.

        Raises:
            UserError: there are checkpoints, but no sound one; or one of a newer format.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.published()):
            damage = _damage(path, reads_all)
            if damage is None:
                return Newest(path, tuple(damaged))
            damaged.append((path, damage))
        if damaged:
            path, damage = damaged[0]
            raise UserError(
                f"no checkpoint in '{self.folder}' is sound: '{path.name}': {damage}; restore it, or move the folders "
                "away to start from step 0"
            )
        return Newest(None, ())

    def set_aside(self, path: Path) -> Path:
        """Rename a damaged checkpoint, so that it is neither found nor counted again; on the main rank only."""
        target = self.folder / f"{_DAMAGED}{path.name}"
        shutil.rmtree(target, ignore_errors=True)
        os.rename(path, target)
        return target

    def save(self, engine: TrainingEngine, metadata: Metadata) -> Path:
        """Publish a checkpoint; collective. Returns its folder.

        Raises:
            StorageError: on every rank, if one could not write; nothing is published then, and nothing pruned.
        """
        return self.begin_save(engine, metadata).result()

    def prepare(self, engine: TrainingEngine) -> None:
        """Get the host memory of saves in the thread that will write them, while training begins; collective."""
        self._last = self._start_writer().submit(reserve, engine, self._memory)

    def begin_save(self, engine: TrainingEngine, metadata: Metadata) -> Future[Path]:
        """Copy the state to host memory and let a thread publish it; collective.

        One save at a time: the next waits until the one before has come to its end. The result is what ``save`` returns
        or raises.
        """
        writer = self._start_writer()
        self.wait()  # its state lies in the memory that this one's takes
        saving = self._last = writer.submit(self._publish, snapshot(engine, self._memory), metadata)
        return saving

    def _start_writer(self) -> ThreadPoolExecutor:
        if self._writer is None:
            # A group of its own: its collectives run beside those of training.
            self._writer = ThreadPoolExecutor(1, "checkpoint")
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        return self._writer

    def wait(self) -> None:
        """Until what is being saved is published, or has failed."""
        if self._last is not None:
            wait([self._last])

    def close(self) -> None:
        """Wait for what is being saved; before the process groups go."""
        if self._writer is not None:
            self._writer.shutdown()

    def _publish(self, state: dict[str, Tensor], metadata: Metadata) -> Path:
        """Write beside, then publish by one rename, then prune."""
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
            if final.exists():
                os.rename(final, self.folder / f"{_WRITING}replaced-{final.name}")
            os.rename(writing, final)
            sync(self.folder)
            self._prune()

        try:
            on_main_rank(reserve, group)
            write_state(state, writing, group)
            names = on_main_rank(describe, group)
            parts = on_every_rank(lambda: digests(writing, names[dist.get_rank() :: dist.get_world_size()]), group)
            on_main_rank(publish, group)
        except StorageError:
            on_main_rank(lambda: shutil.rmtree(writing, ignore_errors=True), group)
            raise
        return final

    def load(self, engine: TrainingEngine, path: Path) -> None:
        """Fill the engine from a published checkpoint; collective."""
        read_state(engine, path, read_metadata(path).optimizer_step)

    def _prune(self) -> None:
        """Best effort: what cannot be removed now is tried again next time."""
        published = self.published()
        permanent = [path for path in published if self.is_permanent(int(path.name.removeprefix("step-")))]
        others = [path for path in published if path not in permanent]
        too_many = others[: -self.keep_last] + (permanent[: -self.keep_permanent] if self.keep_permanent else [])
        for path in [*too_many, *self.folder.glob(_WRITING + "*")]:
            shutil.rmtree(path, ignore_errors=True)


def _damage(path: Path, reads_all: bool) -> str | None:
    """What is wrong with a published checkpoint.

    Raises:
        UserError: it is of a newer format: no damage, and nothing to skip.
    """
    try:
        metadata = read_metadata(path)
    except DamagedError as error:
        return str(error)
    return find_damage(path, reads_all=reads_all) if metadata.has_manifest else None


def refuse_other_model(metadata: Metadata, path: Path, config: dict, data: dict) -> None:
    """Refuse a checkpoint whose model, seed, sequence length or tokenizer is not the run's own.

    Raises:
        UserError: naming the first key that differs, both values and the fix.
    """
    fix = "give the run another name (run.name=...) or restore the setting"
    for section, defaults in {"model": ModelSection(), "mosa": MosaSection()}.items():
        for key, ours in config[section].items():
            # A key that the checkpoint lacks came later; until then the model was what its default says.
            theirs = metadata.config[section].get(key, getattr(defaults, key))
            _same(f"{section}.{key}", theirs, ours, path, fix, key in _MAY_DIFFER)
    _same("run.seed", metadata.config["run"]["seed"], config["run"]["seed"], path, fix)
    _same(
        "data.sequence_length", metadata.config["data"]["sequence_length"], config["data"]["sequence_length"], path, fix
    )
    if not metadata.tokenizer.is_same(TokenizerIdentity.recorded(data)):
        _same("data.path", metadata.data["tokenizer_hash"], data["tokenizer_hash"], path, fix, what="tokenizer hash ")
    _same("data.path", metadata.data["fingerprint"], data["fingerprint"], path, fix, what="dataset fingerprint ")


def _same(
    key: str, theirs: object, ours: object, path: Path, fix: str, may_differ: bool = False, what: str = ""
) -> None:
    if theirs != ours and not may_differ:
        raise UserError(
            f"{key}: checkpoint '{path}' holds another model: {what}{theirs}, but the run asks for {ours}; {fix}"
        )
