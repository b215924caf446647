"""Pretraining from a configuration: put the parts together, resume, run, report."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_mosa.checkpoint import CheckpointStore, Metadata, read_metadata, refuse_other_model
from megatron_mosa.config import Config, check_world_size, config_to_dict, save_config
from megatron_mosa.data import Manifest, TrainingSamples, ValidationSamples, read_manifest, training_batches
from megatron_mosa.engine import DeepSpeedEngine
from megatron_mosa.errors import UserError
from megatron_mosa.metrics import plot_losses, read_journal
from megatron_mosa.model import build_model, parameter_count
from megatron_mosa.parallel import Layout, destroy_parallel, initialize_parallel
from megatron_mosa.parallel.environment import refuse_wrong_apex
from megatron_mosa.train.callbacks.checkpointing import Checkpointing
from megatron_mosa.train.callbacks.progress import Progress
from megatron_mosa.train.callbacks.validation import Validation
from megatron_mosa.train.trainer import Trainer, TrainingState
from megatron_mosa.train.writers import NON_CAUSAL, Writers


def check_start(config: Config, world_size: int) -> tuple[Manifest, Path | None]:
    """Everything that can be refused before a process group exists.

    Returns:
        The dataset's manifest, and the checkpoint to resume from, if any.

    Raises:
        UserError: a layout that does not fit the world, a dataset that is missing or damaged, a run directory with
            another model's checkpoints, or with checkpoints although ``checkpoint.resume`` is "never".
    """
    refuse_wrong_apex()
    check_world_size(config, world_size)
    manifest = read_manifest(config.data.path)
    directory = run_directory(config)
    newest = CheckpointStore(directory / "checkpoints", config.checkpoint.keep_last).newest()
    if newest is not None:
        if config.checkpoint.resume == "never":
            raise UserError(
                f"checkpoint.resume=never, but '{directory}' holds checkpoints; give the run another name (run.name=...), "
                "remove the directory, or set checkpoint.resume=auto"
            )
        data = _data_identity(manifest, config)
        refuse_other_model(read_metadata(newest), newest, config_to_dict(config), data)
    return manifest, newest


def run_directory(config: Config) -> Path:
    """Where the run writes."""
    return Path(config.run.directory) / config.run.name


def pretrain(config: Config) -> None:
    """Train to ``train.steps`` (or ``train.stop_after_step``) from the newest checkpoint, or from the seed.

    Collective: every rank of the job calls it. Writes the run directory (config.yaml, metrics.jsonl, checkpoints/,
    loss.png, TensorBoard events).

    Raises:
        UserError: whatever ``check_start`` refuses, and a run directory that cannot be written.
    """
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    check_world = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))
    manifest, newest = check_start(config, check_world)
    layout = initialize_parallel(config.parallel.tensor_model_parallel_size, config.run.seed)
    try:
        _pretrain(config, manifest, newest, layout)
    finally:
        destroy_parallel()


def _pretrain(config: Config, manifest: Manifest, newest: Path | None, layout: Layout) -> None:
    directory = run_directory(config)
    metadata = read_metadata(newest) if newest else None
    config.data.index_samples = _index_samples(config, metadata)
    state = TrainingState(metadata.step, metadata.consumed_samples) if metadata else TrainingState()
    if state.step >= config.train.steps:
        if layout.is_main:
            print(f"The run is complete: {state.step} of {config.train.steps} steps are in {newest}.")
            _report(config)
        return
    if layout.is_main:
        _prepare_directory(config)
    writers = Writers(
        directory,
        is_main=layout.is_main,
        last_step=config.train.steps,
        resumed_step=state.step,
        tensorboard=config.logging.tensorboard,
    )
    samples = TrainingSamples(
        config.data.path,
        sequence_length=config.data.sequence_length,
        index_samples=config.data.index_samples,
        seed=config.run.seed,
    )
    samples.prepare(state.consumed_samples, config.train.steps * config.train.global_batch_size)
    validation = ValidationSamples(
        config.data.path,
        sequence_length=config.data.sequence_length,
        num_samples=config.validation.num_samples,
    )
    writers.note(
        f"{directory}: {parameter_count(config, manifest.vocab_size):,} parameters on {layout.world_size} x {layout.device.type}, "
        f"tensor parallel {layout.tensor_parallel_size}, data parallel {layout.data_parallel_size}, "
        f"ZeRO {config.parallel.zero_stage}, {config.train.precision}"
    )
    engine = DeepSpeedEngine(build_model(config, manifest.vocab_size), config, layout)
    store = CheckpointStore(directory / "checkpoints", config.checkpoint.keep_last)
    if newest:
        store.load(engine, newest)
        writers.note(f"resumed from {newest}")
    trainer = Trainer(
        config,
        engine,
        layout,
        state,
        callbacks=[
            Progress(writers, manifest.vocab_size),
            Validation(writers, validation),
            Checkpointing(writers, store, _data_identity(manifest, config)),
        ],
    )
    batches = training_batches(
        samples,
        consumed_samples=state.consumed_samples,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=layout.data_parallel_rank,
        data_parallel_size=layout.data_parallel_size,
        num_workers=config.data.num_workers,
    )
    trainer.run(batches)
    del batches  # ends the loader processes
    writers.close()
    engine.destroy()
    if layout.is_main:
        _report(config)


def _index_samples(config: Config, metadata: Metadata | None) -> int:
    """Samples in one shuffled pass: recorded by the first start, since the order depends on it."""
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


def _data_identity(manifest: Manifest, config: Config) -> dict[str, Any]:
    return {
        "index_samples": config.data.index_samples,
        "tokenizer_hash": manifest.tokenizer_hash,
        "vocab_size": manifest.vocab_size,
        "fingerprint": manifest.fingerprint,
    }


def _prepare_directory(config: Config) -> None:
    directory = run_directory(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_config(config, directory / "config.yaml")
    except OSError as error:
        raise UserError(
            f"run directory '{directory}' cannot be written ({error.strerror}); set run.directory to a writable folder"
        ) from None


def _report(config: Config) -> None:
    directory = run_directory(config)
    lines = read_journal(directory / "metrics.jsonl")
    plot_losses(lines, directory / "loss.png", config.run.name)
    validation = next((line for line in reversed(lines) if "validation_loss" in line), None)
    print(f"Run directory:    {directory} (metrics.jsonl, loss.png, checkpoints/, tensorboard/)")
    if validation is None:
        return
    loss, entropy = validation["validation_loss"], validation["unigram_entropy"]
    label = "" if validation["causal"] else f"   ({NON_CAUSAL})"
    print(f"Validation loss:  {loss:.4f} nats per token, perplexity {validation['validation_perplexity']:.2f}{label}")
    print(f"Unigram entropy:  {entropy:.4f} nats per token of the same validation set: the model is {entropy - loss:.4f} below")
    sys.stdout.flush()
