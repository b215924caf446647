"""Thresholds for a model that was trained with expert choice: found on data, beside weights that stay as they are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_mosa.checkpoint.dataset import open_dataset
from megatron_mosa.checkpoint.format import METADATA, Metadata, read_metadata, write_metadata
from megatron_mosa.checkpoint.locate import Kind, find_model_of, publishing, refuse_target
from megatron_mosa.checkpoint.logits import fill_model, one_process
from megatron_mosa.checkpoint.manifest import digests, naming_damage, write_manifest
from megatron_mosa.checkpoint.offline import TensorInfo
from megatron_mosa.checkpoint.offline_writer import write_state_offline
from megatron_mosa.checkpoint.opened import Source
from megatron_mosa.checkpoint.weights import CALIBRATED
from megatron_mosa.errors import UserError

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
    """Write the weights of an expert-choice model with thresholds beside them; no optimizer state.

    Each threshold is the (1 - 1 / rho) quantile of its head's scores over training samples: once as the model selects
    by expert choice, and then once more as it selects by these thresholds, so that every layer is calibrated to what
    those below it do. One process on the CPU, in fp32; prints the loss of both selections on these samples.

    Args:
        path: a checkpoint, or a run directory: its newest.
        target: a folder that is not there.
        data: a built dataset of the same tokenizer; None: the one that the checkpoint names.
        samples: training sequences to calibrate on.
        load_feedback: ``mosa.load_feedback`` of the result.
        force: replace a model that lies at ``target``.

    Raises:
        UserError: no such checkpoint, no MoSA heads, thresholds already, selection per document, no such dataset or
            another tokenizer, a target that is taken.
        RunError: the checkpoint is damaged.
        StorageError: the file system does not take it.
    """
    from megatron_mosa.model.calibration import calibrating

    folder = find_model_of(Kind.OURS, path)
    refuse_target(target, folder, force=force)
    with naming_damage(folder):
        metadata = read_metadata(folder)
        _refuse_others(metadata.config["mosa"], folder)
        read = _training_samples(metadata, data, samples)
        source = Source.open(folder, metadata)
        thresholds, losses = _calibrated(source, calibrating(source.config, load_feedback), read, samples)
        _write(source, target, thresholds, load_feedback)
    print(
        f"{target}: thresholds of {source.config.mosa.num_heads} heads a layer from {samples} training sequences; loss "
        f"on them {losses[0]:.4f} by expert choice (not causal), {losses[1]:.4f} by threshold"
    )


def _refuse_others(mosa: dict[str, Any], folder: Path) -> None:
    if not mosa["num_heads"]:
        raise UserError(f"'{folder}' has no MoSA heads: it is causal as it is")
    if mosa.get("selection") == "threshold":
        raise UserError(f"'{folder}' selects by thresholds already: it is causal as it is")
    if mosa.get("selection_scope") == "document":
        raise UserError(
            f"'{folder}' was trained with mosa.selection_scope=document, where the share that a head takes depends on "
            "the document's length, which no threshold knows; train it on with checkpoint.initialize_from and "
            "mosa.selection=threshold, mosa.selection_scope=sequence"
        )


def _training_samples(metadata: Metadata, path: Path | None, samples: int) -> TrainingSamples:
    from megatron_mosa.data import TrainingSamples

    described = metadata.config["data"]
    found = TrainingSamples(
        open_dataset(metadata, path),
        sequence_length=described["sequence_length"],
        # the run's own order where its index is there
        index_samples=metadata.data["index_samples"] if path is None and metadata.data["index_samples"] else samples,
        seed=metadata.config["run"]["seed"],
        index_path=described.get("index_path") if path is None else None,
        mark_documents=metadata.config["model"].get("attend_within_documents", False),
    )
    found.prepare(0, samples - 1)
    return found


def _calibrated(
    source: Source, config: Config, read: TrainingSamples, samples: int
) -> tuple[dict[str, Tensor], list[float]]:
    """The new tensors by their names, and the losses by expert choice and by threshold."""
    from megatron_mosa.attention.thresholds import threshold_buffers
    from megatron_mosa.model import build_empty_model
    from megatron_mosa.model.calibration import calibrate

    numbers = range(samples)
    losses = []
    with one_process(config), torch.no_grad():
        model = build_empty_model(config, source.vocab_rows)
        fill_model(model, source.read, {weight.name for weight in source.weights})
        calibrate(model, lambda: losses.append(_pass(model, read, numbers)))
        losses.append(_pass(model, read, numbers))
        found = {name: buffer.clone() for name, buffer in threshold_buffers(model).items()}
    counts = {name: torch.full_like(buffer, CALIBRATED) for name, buffer in found.items() if name.endswith("_updates")}
    return found | counts, [losses[0], losses[-1]]


def _pass(model: torch.nn.Module, read: TrainingSamples, numbers: Sequence[int]) -> float:
    """Mean loss, nats per token."""
    from torch.utils.data import default_collate
    from tqdm import tqdm

    from megatron_mosa.model import language_model_loss

    total, tokens = 0.0, 0.0
    doing = "calibrating" if model.training else "measuring"
    for number in tqdm(numbers, doing, unit=" sequences", mininterval=0.5 if sys.stderr.isatty() else 30.0):
        loss, count = language_model_loss(model, **default_collate([read[number]]))
        total, tokens = total + float(loss), tokens + float(count)
    return total / tokens


def _write(source: Source, target: Path, thresholds: dict[str, Tensor], load_feedback: float) -> None:
    new = {f"model.{name}": tensor for name, tensor in thresholds.items()}
    infos = {key: info for key, info in source.state.tensors.items() if key.startswith("model.")}
    infos |= {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in new.items()}
    metadata = source.metadata
    config = metadata.config | {"mosa": metadata.config["mosa"] | _CHANGES | {"load_feedback": load_feedback}}
    with publishing(target) as writing:
        records = write_state_offline(infos, lambda key: new[key] if key in new else source.state.read(key), writing)
        layout = {"tensor_parallel_size": 1, "data_parallel_size": 1}
        write_metadata(replace(metadata, config=config, layout=layout), writing)
        write_manifest(writing, records | digests(writing, [METADATA]))
