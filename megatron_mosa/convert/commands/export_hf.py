"""Export a checkpoint to a folder that transformers loads without this project."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mosa.checkpoint import damage_as_run_error, read_metadata, write_manifest
from megatron_mosa.convert.formats.hf_card import model_card
from megatron_mosa.convert.formats.hf_tokenizer import (
    FoundTokenizer,
    check_exported_tokenizer,
    find_tokenizer,
    write_tokenizer,
)
from megatron_mosa.convert.formats.mosa import CheckpointReader
from megatron_mosa.convert.formats.safetensors import Piece, write_shards
from megatron_mosa.convert.locate import Kind, find_model_of
from megatron_mosa.convert.logits import (
    MOST_KL,
    exported_logits,
    fixed_batch,
    largest_divergence,
    megatron_logits,
)
from megatron_mosa.convert.model_config import to_transformers
from megatron_mosa.convert.target import atomic_folder, check_target
from megatron_mosa.convert.weights import Weight, lacks_thresholds, num_parameters, read_for_export
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.hf import MODELING_FILES
from megatron_mosa.utils import versions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_hf(
    path: Path,
    target: Path,
    *,
    dtype: str = "float32",
    tokenizer: Path | None = None,
    writes_tokenizer: bool = True,
    checks_logits: bool = True,
    force: bool = False,
) -> None:
    """Write safetensors, configuration, modeling code, tokenizer and a model card to ``target``.

    Reads one tensor at a time. The final check builds whole models in fp32: first Megatron's, then the exported one.

    Args:
        path: a checkpoint, or a run directory (its newest checkpoint).
        target: the folder to create.
        dtype: "float32" or "bfloat16", for all weights (thresholds stay fp32).
        tokenizer: tokenizer.json or its folder; None: the tokenizer of the dataset recorded in the checkpoint.
        writes_tokenizer: False: for a caller that has tokens instead of text; not with ``checks_logits``.
        checks_logits: compare logits on a fixed batch; the Megatron model uses the weights rounded to ``dtype``, too.
        force: replace an existing model at ``target``.

    Raises:
        UserError: the checkpoint or tokenizer does not exist, or the target does, or logits are to be compared but no
            thresholds have been set.
        RunError: the checkpoint is damaged, or the exported model does not compute what the Megatron model does; no
            files are left behind.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be {' or '.join(DTYPES)}, got {dtype}")
    checkpoint = find_model_of(Kind.MOSA, path)
    check_target(target, checkpoint, force=force)
    with damage_as_run_error(checkpoint):
        metadata = read_metadata(checkpoint)
        found = find_tokenizer(metadata, tokenizer) if writes_tokenizer else None
        source = CheckpointReader.open(checkpoint, metadata)
        _export(source, target, dtype, found, checks_logits, force)


def _export(
    source: CheckpointReader, target: Path, dtype: str, found: FoundTokenizer | None, checks_logits: bool, force: bool
) -> None:
    parameters = num_parameters(source.weights)
    is_unset = lacks_thresholds(source.weights, source.read)
    if checks_logits and is_unset:
        raise UserError(
            f"'{source.path}' has mosa.selection=threshold, but no optimizer step has set its thresholds, and "
            "transformers refuses such a model; train it, calibrate it with mosa checkpoint causalize, or pass "
            "--no-check to export NaN as thresholds"
        )
    with atomic_folder(target, force=force) as folder:
        if found is not None:
            write_tokenizer(found, source.config.data.sequence_length, folder)
        _write_config(source, dtype, None if found is None else found.end_of_document_id, folder)
        records = write_shards(_pieces(source, DTYPES[dtype]), folder)
        for file in MODELING_FILES:
            shutil.copyfile(file, folder / file.name)
        if checks_logits and found is not None:
            check_exported_tokenizer(found, folder)
        divergence = _check(source, DTYPES[dtype], folder) if checks_logits else None
        verdict = (
            "not checked against the Megatron model (--no-check)"
            if divergence is None
            else f"largest KL divergence from the Megatron model: {divergence:.1e} nats on a fixed batch in fp32"
        )
        facts = {"parameters": f"{parameters:,}, stored in {dtype}", "logits": verdict}
        facts["exported with"] = ", ".join(" ".join(pair) for pair in versions("transformers").items())
        card = model_card(source.metadata, source.config, source.path, facts, lacks_thresholds=is_unset)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_manifest(folder, records)
    print(f"{target}: {parameters:,} parameters in {dtype}; {verdict}")


def _pieces(source: CheckpointReader, dtype: torch.dtype) -> list[Piece]:
    def piece(weight: Weight) -> Piece:
        def read() -> dict[str, Tensor]:
            parts = weight.fusion.split(read_for_export(weight, source.read).to(_export_dtype(weight, dtype)))
            return {key: part.contiguous() for key, part in zip(weight.parts, parts, strict=True)}

        return Piece(_export_dtype(weight, dtype).itemsize * torch.Size(weight.shape).numel(), read)

    return [piece(weight) for weight in source.weights if weight.parts]


def _export_dtype(weight: Weight, dtype: torch.dtype) -> torch.dtype:
    return dtype if weight.is_trained else torch.float32


def _write_config(source: CheckpointReader, dtype: str, end_of_document_id: int | None, folder: Path) -> None:
    from megatron_mosa.hf.configuration_mosa import MosaConfig

    arguments: dict[str, Any] = to_transformers(source.config, source.vocab_rows) | {
        "architectures": ["MosaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mosa.MosaConfig",
            "AutoModel": "modeling_mosa.MosaModel",
            "AutoModelForCausalLM": "modeling_mosa.MosaForCausalLM",
        },
        "bos_token_id": None,
        "eos_token_id": end_of_document_id,
        "pad_token_id": end_of_document_id,
    }
    MosaConfig(**arguments, dtype=dtype).save_pretrained(folder)


def _check(source: CheckpointReader, dtype: torch.dtype, folder: Path) -> float:
    """Return the KL divergence of the exported model from Megatron's model with the same rounded weights."""
    print("comparing logits with the Megatron model", flush=True)
    tokens = fixed_batch(source.config, source.vocab_rows)

    dtypes = {weight.name: _export_dtype(weight, dtype) for weight in source.weights}

    def read(name: str) -> Tensor:
        return source.read(name).to(dtypes[name]).float()

    expected = megatron_logits(source.config, source.vocab_rows, read, tokens)
    divergence = largest_divergence(expected, exported_logits(folder, tokens))
    if divergence > MOST_KL:
        raise RunError(
            f"the exported model does not match the Megatron model: the KL divergence of their logits reaches "
            f"{divergence:.1e} nats, and must be at most {MOST_KL:.0e}; nothing was exported"
        )
    return divergence
