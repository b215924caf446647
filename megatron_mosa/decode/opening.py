"""A model to decode with, from an exported folder or from a checkpoint of ours."""

from __future__ import annotations

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from megatron_mosa.checkpoint.hf_export import export_hf
from megatron_mosa.checkpoint.locate import Kind, find_model
from megatron_mosa.checkpoint.safetensors_folder import read_json
from megatron_mosa.errors import UserError
from megatron_mosa.hf.modeling_mosa import MosaForCausalLM

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


def find_device(name: str) -> torch.device:
    """The device of that name; "auto": a GPU if there is one.

    Raises:
        UserError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # unknown to torch; torch without CUDA
        raise UserError(
            f"--device={name} is not available; expected auto, cpu, and cuda where torch sees a GPU"
        ) from None
    return device


def open_model(path: Path, device: str, dtype: str, tokenizer: Path | None = None) -> tuple[MosaForCausalLM, Any]:
    """The model and its tokenizer; none of the code in the folder is run.

    Args:
        path: an exported folder, or a checkpoint or run directory (its newest), which is exported to a temporary
            folder, without the comparison of logits.
        device: see ``find_device``.
        dtype: "auto" (as stored), "float32", "bfloat16".
        tokenizer: of a checkpoint whose dataset is not there any more; an exported folder has its own.

    Raises:
        UserError: no model of ours; a device or type that is not allowed.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not supported; expected {', '.join(DTYPES)}")
    place = find_device(device)
    folder, kind = find_model(path)
    if kind is Kind.HUGGING_FACE:
        if tokenizer is not None:
            raise UserError(f"--tokenizer={tokenizer}: '{folder}' has its own; leave it out")
        return _load(folder, place, dtype)
    if kind is not Kind.OURS:
        raise UserError(
            f"'{path}' is a {kind.value}; expected a folder written by mosa checkpoint export --to hf, a checkpoint of "
            "ours, a run directory"
        )
    with tempfile.TemporaryDirectory(prefix="mosa-") as temporary:
        exported = Path(temporary) / "exported"
        with redirect_stdout(sys.stderr):  # what is generated goes to the output alone
            export_hf(folder, exported, tokenizer=tokenizer, checks_logits=False)
        return _load(exported, place, dtype)


def _load(folder: Path, device: torch.device, dtype: str) -> tuple[MosaForCausalLM, Any]:
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    kind = read_json(folder / "config.json").get("model_type")
    if kind != "mosa":
        raise UserError(f"'{folder}' has model_type={kind}; expected mosa, as mosa checkpoint export --to hf writes it")
    logging.disable_progress_bar()
    model = MosaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder) if has_tokenizer else None
    return model.to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def check_thresholds(model: MosaForCausalLM, path: Path) -> None:
    """Refuse a model whose thresholds nothing has set.

    Raises:
        UserError: naming the layers.
    """
    try:
        model.model.check_thresholds()
    except ValueError as error:
        raise UserError(f"'{path}': {error}") from None
