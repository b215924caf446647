"""Load a model for decoding from an exported folder or a megatron_mosa checkpoint."""

from __future__ import annotations

import codecs
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from megatron_mosa.checkpoint import damage_as_run_error, read_metadata
from megatron_mosa.convert import (
    Kind,
    check_hugging_face,
    check_vocabulary,
    find_model,
    read_json,
    stored_to_transformers,
)
from megatron_mosa.convert.commands.export_hf import export_hf
from megatron_mosa.data import TOKENIZER_FILE, load_tokenizer, vocabulary_size
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import MosaForCausalLM
from megatron_mosa.utils import first_line

_LONGEST_TEXT = 2**28  # bytes; more would only fill the memory

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


def find_device(name: str) -> torch.device:
    """Return the device of this name; "auto": a GPU if available, else the CPU.

    Raises:
        UserError: the device is unknown or not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # unknown to torch; torch without CUDA
        raise UserError(
            f"--device={name} is not available; it must be auto, cpu, or cuda (if torch finds a GPU)"
        ) from None
    return device


def load_model(
    path: Path,
    device: str,
    dtype: str,
    require: Callable[[MosaConfig, Path], None],
    tokenizer: Path | None = None,
    *,
    needs_tokenizer: bool = True,
) -> tuple[MosaForCausalLM, Any]:
    """Load a model and its tokenizer, without running any code from the folder.

    Args:
        path: an exported folder, or a checkpoint or run directory (its newest checkpoint), which is first exported to a
            temporary folder, without comparing logits.
        device: see ``find_device``.
        dtype: "auto" (as stored), "float32" or "bfloat16".
        require: raises a UserError for a model that its caller cannot use; called before a checkpoint is exported.
        tokenizer: tokenizer.json for a checkpoint whose dataset no longer exists, or for a folder without one.
        needs_tokenizer: False: a checkpoint may be without one.

    Returns:
        The model, and its tokenizer or None.

    Raises:
        UserError: ``path`` holds no suitable model, or the device or dtype is invalid.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    torch_device = find_device(device)
    folder, kind = find_model(path)
    if kind is Kind.HUGGING_FACE:
        if tokenizer is not None and (folder / TOKENIZER_FILE).is_file():
            raise UserError(f"--tokenizer={tokenizer}: '{folder}' has its own tokenizer; omit --tokenizer")
        model, text_tokenizer = _load(folder, torch_device, dtype)
        require(model.config, path)
        return model, text_tokenizer if tokenizer is None else _given(tokenizer, model.config)
    if kind is not Kind.MOSA:
        raise UserError(
            f"'{path}' is a {kind.value}; pass a folder written by mosa checkpoint export --to hf, a megatron_mosa "
            "checkpoint, or a run directory"
        )
    with damage_as_run_error(folder):
        config = MosaConfig(**stored_to_transformers(read_metadata(folder).config))
    require(config, path)
    with tempfile.TemporaryDirectory(prefix="mosa-") as temporary:
        exported = Path(temporary) / "exported"
        with redirect_stdout(sys.stderr):  # keep standard output for the generated text
            export_hf(folder, exported, tokenizer=tokenizer, writes_tokenizer=needs_tokenizer, checks_logits=False)
        return _load(exported, torch_device, dtype)


def _load(folder: Path, device: torch.device, dtype: str) -> tuple[MosaForCausalLM, Any]:
    from safetensors import SafetensorError
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    with damage_as_run_error(folder):
        kind = read_json(folder / "config.json").get("model_type")
    if kind != "mosa":
        raise UserError(f"'{folder}' has model_type={kind}; pass a folder written by mosa checkpoint export --to hf")
    try:
        with damage_as_run_error(folder):
            check_hugging_face(folder)  # transformers would draw weights that are missing, and load others in part
    except UserError as error:
        raise RunError(f"{error}; export the model again") from None
    logging.disable_progress_bar()
    try:
        model = MosaForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise RunError(
            f"'{folder}' is damaged: its weights cannot be read ({first_line(error)}); export the model again"
        ) from None
    tokenizer = None
    if (file := folder / TOKENIZER_FILE).is_file():
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            tokenizer("a", verbose=False)  # some damage shows only now
        except Exception as error:  # the library raises a bare Exception for most damage
            raise RunError(f"'{file}' is damaged ({first_line(error)}); export the model again") from None
    return model.to(device).eval(), tokenizer  # pyright: ignore[reportArgumentType]


def _given(path: Path, config: MosaConfig) -> Any:
    """Return the tokenizer of the option ``--tokenizer``, for a folder without one."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = load_tokenizer(str(path))
    except UserError as error:
        raise type(error)(str(error).replace("data.tokenizer", "--tokenizer", 1)) from None
    check_vocabulary(f"--tokenizer={path}", vocabulary_size(tokenizer), config.vocab_size, "pass the model's own")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def check_thresholds(model: MosaForCausalLM, path: Path) -> None:
    """Refuse a model with thresholds that were never set.

    Raises:
        UserError: names the affected layers.
    """
    try:
        model.model.check_thresholds()
    except ValueError as error:
        raise UserError(f"'{path}': {error}") from None


def require_cache(config: MosaConfig, path: Path) -> None:
    """Refuse a model that looks ahead, so that nothing can be cached.

    Raises:
        UserError: it does.
    """
    if not config.can_decode:
        is_routing = config.num_routing_heads > 0
        heads = "has Routing heads" if is_routing else "selects by expert choice (mosa.selection)"
        fix = "without Routing heads" if is_routing else "with mosa.selection=threshold or without MoSA heads"
        raise UserError(
            f"'{path}' {heads}: every token changes the selection, so nothing can be cached; pass a model {fix}"
        )


def read_document(option: str, file: Path) -> str:
    """Return the text of a file given by an option, read like a source of training data; "-": standard input.

    Raises:
        UserError: it cannot be read, is not UTF-8 text, or never ends.
    """
    is_pipe_of_shell = file.parent.name == "fd"  # as in <(command)
    if str(file) == "-" and sys.stdin is None:
        raise UserError(f"{option}=-: standard input is closed; pass a text file")
    try:
        if str(file) != "-" and file.exists() and not (file.is_file() or file.is_dir() or is_pipe_of_shell):
            raise UserError(f"{option}={file} is not a file; pass a text file, or - for standard input")
        with nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb") as content:
            found = content.read(_LONGEST_TEXT + 1)
        if len(found) > _LONGEST_TEXT:
            raise UserError(f"{option}={file} has more than {_LONGEST_TEXT:,} bytes; pass a shorter text")
        return found.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"could not read {option}={file}: {reason}; pass a text file") from None
