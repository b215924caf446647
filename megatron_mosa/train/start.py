"""What is settled before a process group exists: may this run start, and from where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mosa.checkpoint import CheckpointStore, Metadata, read_metadata, refuse_other_model
from megatron_mosa.config import Config, check_world_size, config_to_dict
from megatron_mosa.data import Manifest, read_manifest
from megatron_mosa.errors import UserError
from megatron_mosa.parallel.environment import refuse_wrong_apex


@dataclass(frozen=True)
class Start:
    """Where a run starts from."""

    directory: Path
    """The run directory."""

    manifest: Manifest
    """Of the dataset."""

    checkpoint: Path | None
    """The newest checkpoint, if there is one."""

    metadata: Metadata | None
    """That checkpoint's."""

    index_samples: int
    """Samples in one shuffled pass: recorded by the first start, because the data order depends on it."""

    @property
    def data_identity(self) -> dict[str, Any]:
        """What a checkpoint records of its data."""
        return {
            "index_samples": self.index_samples,
            "tokenizer_hash": self.manifest.tokenizer_hash,
            "vocab_size": self.manifest.vocab_size,
            "fingerprint": self.manifest.fingerprint,
        }


def check_start(config: Config, world_size: int) -> Start:
    """Decide whether and from where ``world_size`` processes may start.

    Raises:
        UserError: a layout that does not fit the world, a dataset that is missing or damaged, a run directory with
            another model's checkpoints, or with checkpoints although ``checkpoint.resume`` is "never".
    """
    refuse_wrong_apex()
    check_world_size(config, world_size)
    manifest = read_manifest(config.data.path)
    _refuse_other_tokenizer(config, manifest)
    directory = Path(config.run.directory) / config.run.name
    checkpoint = CheckpointStore(directory / "checkpoints", config.checkpoint.keep_last).newest()
    metadata = read_metadata(checkpoint) if checkpoint else None
    start = Start(directory, manifest, checkpoint, metadata, _index_samples(config, metadata))
    if checkpoint is not None and metadata is not None:
        if config.checkpoint.resume == "never":
            raise UserError(
                f"checkpoint.resume=never, but '{directory}' holds checkpoints; give the run another name "
                "(run.name=...), remove the directory, or set checkpoint.resume=auto"
            )
        refuse_other_model(metadata, checkpoint, config_to_dict(config), start.data_identity)
    return start


def _refuse_other_tokenizer(config: Config, manifest: Manifest) -> None:
    built, asked = manifest.request["tokenizer"], config.data.tokenizer
    if built != asked:
        raise UserError(
            f"data.tokenizer={asked or 'null'}, but the dataset {config.data.path} was built with another tokenizer, "
            f"{built or 'null (trained on its sources)'}; rebuild it (mosa data build CONFIG --force) or restore it"
        )


def _index_samples(config: Config, metadata: Metadata | None) -> int:
    asked = config.data.index_samples
    if metadata is None:
        return asked or config.train.steps * config.train.global_batch_size
    recorded = metadata.data["index_samples"]
    if asked is not None and asked != recorded:
        raise UserError(
            f"data.index_samples={asked}, but this run was started with {recorded}; another number would reshuffle its "
            f"data: set it to {recorded} or to null"
        )
    return recorded
