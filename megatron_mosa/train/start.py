"""Checks before any process group exists: whether this run may start, and from where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_mosa.checkpoint import (
    CheckpointStore,
    Metadata,
    NewestCheckpoint,
    check_resumable,
    check_same_model,
    read_metadata,
)
from megatron_mosa.config import Config, check_world_size, config_to_dict
from megatron_mosa.data import (
    Manifest,
    Mixture,
    TrainingSamples,
    ValidationSamples,
    check_tokenizer,
    open_mixture,
)
from megatron_mosa.errors import UserError
from megatron_mosa.kernels import get_backend
from megatron_mosa.parallel import apex_fused_adam, apex_norms, reject_wrong_apex
from megatron_mosa.train.directory import check_writable


@dataclass(frozen=True)
class ResumePoint:
    """The state on disk that a run starts from."""

    directory: Path
    """The run directory."""

    data: Mixture
    """One dataset, or several in fixed shares."""

    checkpoint: Path | None
    """The newest checkpoint, if there is one."""

    metadata: Metadata | None
    """Metadata of that checkpoint."""

    damaged: tuple[tuple[Path, str], ...]
    """Newer checkpoints that are damaged, each with its damage."""

    initial: Path | None
    """The checkpoint that provides the initial weights of a run without checkpoints; None: draw them from the seed."""

    index_samples: int
    """Samples in one shuffled pass, recorded by the run's first start because the data order depends on it."""

    unlike_initial: tuple[str, ...] = ()
    """Settings in which the model differs from that of the initial weights, though their shapes are the same."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first dataset; all datasets share its tokenizer and vocabulary."""
        return self.data.manifest

    @property
    def data_identity(self) -> dict[str, Any]:
        """What the data of a run depends on."""
        return {
            "index_samples": self.index_samples,
            "tokenizer_hash": self.manifest.tokenizer_hash,
            "encoding_hash": self.manifest.encoding_hash,
            "vocab_size": self.manifest.vocab_size,
            "fingerprint": self.data.fingerprint,
        }

    @property
    def data_record(self) -> dict[str, Any]:
        """What a checkpoint records about its data."""
        return self.data_identity | {"sources": self.data.source_names}


def check_start(
    config: Config, world_size: int, *, reads_all: bool = False, checks_devices: bool = True
) -> ResumePoint:
    """Decide whether ``world_size`` processes may start the run, and from where.

    Args:
        reads_all: verify all data of the newest checkpoint, not only its file sizes.
        checks_devices: also check that this machine's devices support the run; False if it will run on other machines.

    Raises:
        UserError: the layout does not fit the world size; the dataset is missing or damaged; the run directory holds
            checkpoints of another model, or a run although ``checkpoint.resume`` is "never"; the initial weights are
            missing, damaged or of another model.
    """
    reject_wrong_apex()
    if checks_devices:
        _check_apex(config)
        mosa_backend(config)
    _check_wandb(config)
    check_world_size(config, world_size)
    data = open_mixture(config.data, reads_all=reads_all)
    check_tokenizer(config.data, data)
    directory, (checkpoint, damaged), metadata = _newest(config, reads_all)
    check_writable(directory)
    start = ResumePoint(directory, data, checkpoint, metadata, damaged, None, _index_samples(config, data, metadata))
    _check_lengths(config, start)
    if config.checkpoint.resume == "never" and (checkpoint is not None or (directory / "metrics.jsonl").exists()):
        raise UserError(
            f"checkpoint.resume=never, but '{directory}' already holds a run; give this one another name "
            "(run.name=...), remove the directory, or set checkpoint.resume=auto"
        )
    if checkpoint is not None and metadata is not None:
        check_same_model(metadata, checkpoint, config_to_dict(config), start.data_identity)
        if metadata.has_manifest:  # those without are older than checkpoints of weights alone
            check_resumable(checkpoint)
    elif config.checkpoint.initialize_from is not None:
        from megatron_mosa.convert import (  # a start without it loads no conversion code
            changed_settings,
            find_initial_weights,
        )

        path = Path(config.checkpoint.initialize_from)
        initial = find_initial_weights(path, config, start.data_identity, reads_all=reads_all)
        return replace(start, initial=initial, unlike_initial=changed_settings(read_metadata(initial).config, config))
    return start


def _check_lengths(config: Config, start: ResumePoint) -> None:
    """Raise a UserError unless both splits hold at least one sequence."""
    training_samples(config, start.data, start.index_samples)
    ValidationSamples(start.data, sequence_length=config.data.sequence_length, num_samples=1)


def _check_apex(config: Config) -> None:
    if config.train.apex != "always":
        return
    if not torch.cuda.is_available():
        raise UserError("train.apex=always needs a GPU, and this machine has none; set train.apex=auto")
    for extension, found in (("amp_C", apex_fused_adam()), ("fused_layer_norm_cuda", apex_norms())):
        if found is None:
            raise UserError(
                f"train.apex=always needs NVIDIA apex's CUDA extension {extension}, which is missing or was built for "
                "another torch; build apex from its source (APEX_CPP_EXT=1 APEX_CUDA_EXT=1), or set train.apex=auto"
            )


def mosa_backend(config: Config) -> str:
    """Return the kernels that MoSA heads use on this machine: "naive" or "triton".

    Raises:
        UserError: the configured kernels do not run on this machine.
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
            "run `pip install wandb`, or set it to null"
        )


def training_samples(config: Config, data: Mixture, index_samples: int) -> TrainingSamples:
    """Return the samples that a run of this configuration reads, in its order."""
    return TrainingSamples(
        data,
        sequence_length=config.data.sequence_length,
        index_samples=index_samples,
        seed=config.run.seed,
        index_path=config.data.index_path,
        mark_documents=config.model.attend_within_documents,
    )


def validation_samples(config: Config, data: Mixture) -> ValidationSamples:
    """Return the samples that a run of this configuration validates on."""
    return ValidationSamples(
        data,
        sequence_length=config.data.sequence_length,
        num_samples=config.validation.num_samples,
        mark_documents=config.model.attend_within_documents,
    )


def planned_samples(config: Config, data: Mixture) -> TrainingSamples:
    """Return the samples of the run that this configuration would start or resume."""
    return training_samples(config, data, _index_samples(config, data, _newest(config, False)[2]))


def build_index(config: Config) -> list[Path]:
    """Build every missing sample index up to ``train.steps``, and return the directories of all indices.

    This needs one process and no device. A run that starts or resumes afterwards builds no index itself.

    Raises:
        UserError: a dataset is missing, damaged or too short, or a directory cannot be written.
    """
    samples = planned_samples(config, open_mixture(config.data))
    return samples.prepare(0, planned_end(config) - 1)


def planned_end(config: Config) -> int:
    """Return how many samples the run will have taken after ``train.steps``, from its newest checkpoint on, if any."""
    metadata = _newest(config, False)[2]
    return end_of_samples(config, metadata.step, metadata.consumed_samples) if metadata else end_of_samples(config)


def end_of_samples(config: Config, step: int = 0, consumed_samples: int = 0) -> int:
    """Return how many samples a run takes up to ``train.steps``; the batch size may have been another before ``step``.

    Args:
        step: steps taken so far.
        consumed_samples: samples of these steps.
    """
    return consumed_samples + max(config.train.steps - step, 0) * config.train.global_batch_size


def _newest(config: Config, reads_all: bool) -> tuple[Path, NewestCheckpoint, Metadata | None]:
    """Return the run directory, its newest checkpoint and that checkpoint's metadata."""
    newest = CheckpointStore.of(config.run.path, config.checkpoint).newest(reads_all=reads_all)
    return config.run.path, newest, read_metadata(newest.path) if newest.path else None


def _index_samples(config: Config, data: Mixture, metadata: Metadata | None) -> int:
    requested = config.data.index_samples
    if metadata is None:
        # A trial of a few steps may be extended by many small passes.
        return requested or max(end_of_samples(config), data.fewest_index_samples)
    recorded = metadata.data["index_samples"]
    if requested is not None and requested != recorded:
        raise UserError(
            f"data.index_samples={requested}, but this run was started with {recorded}; a change would reshuffle its "
            f"data; set it to {recorded} or to null"
        )
    return recorded
