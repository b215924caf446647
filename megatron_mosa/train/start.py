"""What is settled before a process group exists: may this run start, and from where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_mosa.checkpoint import (
    CheckpointStore,
    Metadata,
    Newest,
    find_initial_weights,
    read_metadata,
    refuse_other_model,
)
from megatron_mosa.config import Config, check_world_size, config_to_dict
from megatron_mosa.data import Manifest, Mixture, TrainingSamples, ValidationSamples, open_mixture
from megatron_mosa.errors import UserError
from megatron_mosa.kernels import get_backend
from megatron_mosa.parallel.apex import apex_fused_adam, apex_norms, reject_wrong_apex
from megatron_mosa.train.directory import check_writable


@dataclass(frozen=True)
class ResumePoint:
    """Where a run starts from."""

    directory: Path
    """The run directory."""

    data: Mixture
    """The dataset, or several in fixed shares."""

    checkpoint: Path | None
    """The newest checkpoint, if there is one."""

    metadata: Metadata | None
    """That checkpoint's."""

    damaged: tuple[tuple[Path, str], ...]
    """Newer checkpoints that are not sound, and what is wrong with each."""

    initial: Path | None
    """The checkpoint whose weights the run begins with, if it has none of its own; None: weights of the seed."""

    index_samples: int
    """Samples in one shuffled pass: recorded by the first start, because the data order depends on it."""

    @property
    def manifest(self) -> Manifest:
        """Of the first dataset; tokenizer and vocabulary are those of all."""
        return self.data.manifest

    @property
    def data_identity(self) -> dict[str, Any]:
        """What a checkpoint records of its data."""
        return {
            "index_samples": self.index_samples,
            "tokenizer_hash": self.manifest.tokenizer_hash,
            "encoding_hash": self.manifest.encoding_hash,
            "vocab_size": self.manifest.vocab_size,
            "fingerprint": self.data.fingerprint,
        }


def check_start(
    config: Config, world_size: int, *, reads_all: bool = False, devices_are_here: bool = True
) -> ResumePoint:
    """Decide whether and from where ``world_size`` processes may start.

    Args:
        reads_all: look for damage in all that the newest checkpoint holds, not in the sizes of its files alone.
        devices_are_here: False: the run will be on other machines than this one, whose GPUs, or none, do not matter.

    Raises:
        UserError: a layout that does not fit the world, a dataset that is missing or damaged, a run directory with
            another model's checkpoints, or with checkpoints although ``checkpoint.resume`` is "never";
            initial weights that are missing, damaged or another model's.
    """
    reject_wrong_apex()
    if devices_are_here:
        _check_apex(config)
        mosa_backend(config)
    _check_wandb(config)
    check_world_size(config, world_size)
    data = open_mixture(config.data, reads_all=reads_all)
    _refuse_other_tokenizer(config, data.manifest)
    directory, (checkpoint, damaged), metadata = _newest(config, reads_all)
    check_writable(directory)
    start = ResumePoint(directory, data, checkpoint, metadata, damaged, None, _index_samples(config, metadata))
    _check_lengths(config, start)
    if config.checkpoint.resume == "never" and (checkpoint is not None or (directory / "metrics.jsonl").exists()):
        raise UserError(
            f"checkpoint.resume=never, but '{directory}' holds a run; give this one another name (run.name=...), "
            "remove the directory, or set checkpoint.resume=auto"
        )
    if checkpoint is not None and metadata is not None:
        refuse_other_model(metadata, checkpoint, config_to_dict(config), start.data_identity)
    elif config.checkpoint.initialize_from is not None:
        path = Path(config.checkpoint.initialize_from)
        initial = find_initial_weights(path, config, start.data_identity, reads_all=reads_all)
        return replace(start, initial=initial)
    return start


def _check_lengths(config: Config, start: ResumePoint) -> None:
    """Both splits must hold at least one sequence."""
    training_samples(config, start.data, start.index_samples)
    ValidationSamples(start.data, sequence_length=config.data.sequence_length, num_samples=1)


def _check_apex(config: Config) -> None:
    if config.train.apex != "always":
        return
    if not torch.cuda.is_available():
        raise UserError("train.apex=always, but there is no GPU for NVIDIA apex; set train.apex=auto")
    for extension, found in (("amp_C", apex_fused_adam()), ("fused_layer_norm_cuda", apex_norms())):
        if found is None:
            raise UserError(
                f"train.apex=always, but NVIDIA apex's CUDA extension {extension} is not there or fits another torch; "
                "build apex from its source (APEX_CPP_EXT=1 APEX_CUDA_EXT=1), or set train.apex=auto"
            )


def mosa_backend(config: Config) -> str:
    """The kernels that the MoSA heads run on here: "naive" or "triton".

    Raises:
        UserError: those that are asked for do not run here.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    states = torch.empty(0, dtype=dtype, device=device)
    try:
        return get_backend(config.mosa.backend, states, config.model.head_dim).NAME
    except ValueError as error:
        raise UserError(f"mosa.{error}") from None


def _check_wandb(config: Config) -> None:
    if config.logging.wandb_project is not None and find_spec("wandb") is None:
        raise UserError(
            f"logging.wandb_project={config.logging.wandb_project} needs the package wandb, which is not installed; "
            "pip install wandb, or set it to null"
        )


def training_samples(config: Config, data: Mixture, index_samples: int) -> TrainingSamples:
    """The samples that a run of this configuration reads, in its order."""
    return TrainingSamples(
        data,
        sequence_length=config.data.sequence_length,
        index_samples=index_samples,
        seed=config.run.seed,
        index_path=config.data.index_path,
        mark_documents=config.model.attend_within_documents,
    )


def planned_samples(config: Config, data: Mixture) -> TrainingSamples:
    """The samples of the run that this configuration would start, or go on with."""
    return training_samples(config, data, _index_samples(config, _newest(config, False)[2]))


def build_index(config: Config) -> list[Path]:
    """Build every sample index up to ``train.steps`` that is not there yet; return the folders of all.

    It needs one process and no device. The run that follows, or goes on from its newest checkpoint, then writes none.

    Raises:
        UserError: a dataset that is missing, damaged or too short, a folder that cannot be written.
    """
    samples = planned_samples(config, open_mixture(config.data))
    return samples.prepare(0, config.train.steps * config.train.global_batch_size - 1)


def _newest(config: Config, reads_all: bool) -> tuple[Path, Newest, Metadata | None]:
    """The run directory, its newest checkpoint, and what that says of itself."""
    directory = Path(config.run.directory) / config.run.name
    newest = CheckpointStore.of(directory, config.checkpoint).newest(reads_all=reads_all)
    return directory, newest, read_metadata(newest.path) if newest.path else None


def _refuse_other_tokenizer(config: Config, manifest: Manifest) -> None:
    if config.data.path is None:
        return  # a blend: one dataset's tokenizer is usually given to the others by its path
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
