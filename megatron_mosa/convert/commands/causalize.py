"""Calibrate selection thresholds on data for a model that selects by expert choice, without changing its weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_mosa.checkpoint import (
    METADATA,
    Metadata,
    TensorInfo,
    damage_as_run_error,
    hash_files,
    read_metadata,
    write_manifest,
    write_metadata,
    write_state_offline,
)
from megatron_mosa.convert.dataset import open_dataset
from megatron_mosa.convert.formats.mosa import CheckpointReader
from megatron_mosa.convert.locate import Kind, find_model_of
from megatron_mosa.convert.logits import load_weights, single_process_groups
from megatron_mosa.convert.target import atomic_folder, check_target
from megatron_mosa.convert.weights import CALIBRATED, lacks_thresholds
from megatron_mosa.errors import UserError
from megatron_mosa.utils import counted

if TYPE_CHECKING:
    from megatron_mosa.config import Config
    from megatron_mosa.data import TrainingSamples

_CHANGES = {"selection": "threshold", "include_first_token": True}


def causalize(
    path: Path,
    target: Path,
    *,
    data: Path | None = None,
    samples: int = 256,
    load_feedback: float = 0.0,
    force: bool = False,
) -> None:
    """Write the weights of an expert-choice model together with calibrated thresholds, without optimizer state.

    So can those of a model of ``mosa.selection=threshold`` whose thresholds no optimizer step has set.

    Each threshold is the (1 - 1 / rho) quantile of its head's scores over training samples. A first pass selects by
    expert choice; a second pass selects by the thresholds of the first, so that every layer is calibrated to what the
    layers below it do. Runs in one process on the CPU, in fp32, and prints the loss of both selections on these
    samples.

    Args:
        path: a checkpoint, or a run directory (its newest checkpoint).
        target: the folder to create.
        data: a dataset built with the same tokenizer; None: the dataset recorded in the checkpoint.
        samples: number of training sequences to calibrate on.
        load_feedback: ``mosa.load_feedback`` of the result.
        force: replace an existing model at ``target``.

    Raises:
        UserError: the checkpoint or dataset does not exist, the model has no MoSA heads, has Routing heads, already has
            thresholds, or selects per document, the dataset has another tokenizer, or the target exists.
        RunError: the checkpoint is damaged.
        StorageError: writing the target failed.
    """
    from megatron_mosa.model import calibration_config

    folder = find_model_of(Kind.MOSA, path)
    check_target(target, folder, force=force)
    with damage_as_run_error(folder):
        metadata = read_metadata(folder)
        _check_convertible(metadata.config["model"], metadata.config["mosa"], folder)
        source = CheckpointReader.open(folder, metadata)
        if source.config.mosa.selection == "threshold" and not lacks_thresholds(source.weights, source.read):
            raise UserError(f"'{folder}' already selects by thresholds: it is already causal")
        read = _training_samples(metadata, data, samples)
        thresholds, losses = _calibrated(source, calibration_config(source.config, load_feedback), read, samples)
        _write(source, target, thresholds, load_feedback, force)
    print(
        f"{target}: calibrated thresholds of {counted(source.config.mosa.num_heads, 'head')} per layer on "
        f"{counted(samples, 'training sequence')}; loss on them: {losses[0]:.4f} with expert choice (not causal), "
        f"{losses[1]:.4f} with thresholds"
    )


def _check_convertible(model: dict[str, Any], mosa: dict[str, Any], folder: Path) -> None:
    if model.get("num_routing_heads"):
        raise UserError(
            f"'{folder}' has Routing heads (model.num_routing_heads={model['num_routing_heads']}), which look at the "
            "whole sequence and have no thresholds; give a model without them"
        )
    if not mosa["num_heads"]:
        raise UserError(f"'{folder}' has no MoSA heads: it is already causal")
    if mosa.get("selection") == "token_choice":
        raise UserError(f"'{folder}' selects by token choice: it is already causal")
    if mosa.get("selection_scope") == "document":
        raise UserError(
            f"'{folder}' was trained with mosa.selection_scope=document, where the share of tokens that a head selects "
            "depends on the document's length, which a threshold cannot reproduce; continue training it with "
            "checkpoint.initialize_from, mosa.selection=threshold and mosa.selection_scope=sequence"
        )


def _training_samples(metadata: Metadata, path: Path | None, samples: int) -> TrainingSamples:
    from megatron_mosa.data import TrainingSamples

    data_config = metadata.config["data"]
    found = TrainingSamples(
        open_dataset(metadata, path),
        sequence_length=data_config["sequence_length"],
        # keep the run's own data order where its index is recorded
        index_samples=metadata.data["index_samples"] if path is None and metadata.data["index_samples"] else samples,
        seed=metadata.config["run"]["seed"],
        index_path=data_config.get("index_path") if path is None else None,
        mark_documents=metadata.config["model"].get("attend_within_documents", False),
    )
    found.prepare(0, samples - 1)
    return found


def _calibrated(
    source: CheckpointReader, config: Config, read: TrainingSamples, samples: int
) -> tuple[dict[str, Tensor], list[float]]:
    """Return the new tensors by name, and the losses with expert choice and with thresholds."""
    from megatron_mosa.attention import selection_buffers
    from megatron_mosa.model import build_empty_model, calibrate

    numbers = range(samples)
    losses = []
    with single_process_groups(config), torch.no_grad():
        model = build_empty_model(config, source.vocab_rows)
        load_weights(model, source.read, {weight.name for weight in source.weights})
        calibrate(model, lambda: losses.append(_pass(model, read, numbers)))
        losses.append(_pass(model, read, numbers))
        found = {name: buffer.clone() for name, buffer in selection_buffers(model).items()}
    counts = {name: torch.full_like(buffer, CALIBRATED) for name, buffer in found.items() if name.endswith("_updates")}
    return found | counts, [losses[0], losses[-1]]


def _pass(model: torch.nn.Module, read: TrainingSamples, numbers: Sequence[int]) -> float:
    """Return the mean loss in nats per token."""
    from torch.utils.data import default_collate
    from tqdm import tqdm

    from megatron_mosa.model import language_model_loss

    total, tokens = 0.0, 0.0
    action = "calibrating" if model.training else "measuring"
    for number in tqdm(numbers, action, unit=" sequences", mininterval=0.5 if sys.stderr.isatty() else 30.0):
        loss, count = language_model_loss(model, **default_collate([read[number]]))
        total, tokens = total + float(loss), tokens + float(count)
    return total / tokens


def _write(
    source: CheckpointReader, target: Path, thresholds: dict[str, Tensor], load_feedback: float, force: bool
) -> None:
    new = {f"model.{name}": tensor for name, tensor in thresholds.items()}
    infos = {key: info for key, info in source.state.tensors.items() if key.startswith("model.")}
    infos |= {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in new.items()}
    metadata = source.metadata
    config = metadata.config | {"mosa": metadata.config["mosa"] | _CHANGES | {"load_feedback": load_feedback}}
    with atomic_folder(target, force=force) as writing:
        records = write_state_offline(infos, lambda key: new[key] if key in new else source.state.read(key), writing)
        layout = {"tensor_parallel_size": 1, "data_parallel_size": 1}
        write_metadata(replace(metadata, config=config, layout=layout), writing)
        write_manifest(writing, records | hash_files(writing, [METADATA]))
