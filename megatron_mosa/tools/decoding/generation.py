"""Read a prompt and stream the model's completion, for ``mosa generate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mosa.errors import RunError, UserError
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.tools.decoding.loading import check_thresholds, load_model, read_document
from megatron_mosa.tools.decoding.sampling import Sampling


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the prompt, given as text or as a file ("-": standard input).

    Raises:
        UserError: neither or both are given, the prompt is empty, or the file is not UTF-8 text.
    """
    if (prompt is None) == (file is None):
        raise UserError("pass either --prompt TEXT or --prompt-file FILE (- for standard input)")
    if file is not None:
        prompt = read_document("--prompt-file", file)
    elif prompt and not prompt.isascii() and prompt.encode(errors="replace").decode() != prompt:
        raise UserError("--prompt is not UTF-8 text; write it as UTF-8, or pass --prompt-file FILE")
    if not prompt:
        raise UserError(f"--{'prompt-file' if file else 'prompt'} is empty; pass at least one token of text")
    return prompt


def generate_text(
    path: Path,
    prompt: str,
    sampling: Sampling,
    *,
    device: str,
    dtype: str,
    tokenizer: Path | None = None,
    causal_approximation: str | None = None,
) -> None:
    """Stream a completion to standard output; see ``load_model`` for what ``path`` may be.

    Raises:
        UserError: the model selects by expert choice and no approximation was requested, its thresholds are not
            calibrated, or it has no tokenizer.
        RunError: its logits are not finite.
    """
    from transformers import LogitsProcessorList

    def check(_: Tensor, logits: Tensor) -> Tensor:  # the library samples from NaN with a traceback, or takes token 0
        if not logits.max().isfinite():  # NaN if any is
            raise RunError(
                f"the logits of '{path}' are not finite: its training diverged, or its weights are damaged; export the "
                "model again, or an earlier checkpoint"
            )
        return logits

    require = partial(_require_decodable, approximation=causal_approximation)
    model, text_tokenizer = load_model(path, device, dtype, require, tokenizer)
    if model.config.can_decode:
        check_thresholds(model, path)
    if text_tokenizer is None:
        raise UserError(f"'{path}' has no tokenizer.json; pass the model's: --tokenizer PATH")
    ids = text_tokenizer(prompt, return_tensors="pt", verbose=False, add_special_tokens=False).input_ids.to(
        model.device
    )  # [1, T]
    if ids.shape[1] == 0:
        raise UserError("--prompt has no tokens; pass at least one token of text")
    torch.manual_seed(sampling.seed)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=_Printer(text_tokenizer),
        logits_processor=LogitsProcessorList([check]),
        causal_approximation=causal_approximation,
        **sampling.options(),
    )


class _Printer:
    """Prints the text of new tokens as they come, for ``generate(streamer=)``.

    Tokens are decoded behind those before them: alone, those of some tokenizers lose the space in front.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._has_prompt = False
        self._context: list[int] = []  # the tokens before the new ones; they end with a whole character
        self._new: list[int] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt first, [1, T], then one new token after the other, [1]."""
        ids = value.flatten().tolist()
        if not self._has_prompt:
            self._has_prompt, self._context = True, ids
            return
        self._new += ids
        text = self._text()
        if text and not text.endswith("\ufffd"):  # else a character may lack bytes
            print(text, end="", flush=True)
            self._context, self._new = self._new, []

    def end(self) -> None:
        """Print what is left, and end the line."""
        print(self._text())

    def _text(self) -> str:
        before, whole = (
            self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (self._context, self._context + self._new)
        )
        return whole[len(before) :]


def _require_decodable(config: MosaConfig, path: Path, approximation: str | None) -> None:
    if config.can_decode:
        if approximation is not None:
            raise UserError(
                f"--causal-approximation={approximation}: '{path}' is already causal; omit --causal-approximation"
            )
    elif approximation is None and config.num_routing_heads:
        raise UserError(
            f"'{path}' has Routing heads, which look at the whole sequence, so no token can be decoded before the "
            "following ones are known; use a model without them, or pass --causal-approximation prefix (forms clusters "
            "from the prefix for every token: slow, and not what was trained)"
        )
    elif approximation is None:
        raise UserError(
            f"'{path}' selects by expert choice (mosa.selection), which looks at the whole sequence, so no token can "
            "be decoded before the following ones are known; convert it with mosa checkpoint causalize, use a model "
            "trained with mosa.selection=threshold, or pass --causal-approximation prefix (reselects from the prefix "
            "for every token: slow, and not what was trained)"
        )
    elif approximation != "prefix":
        raise UserError(f"--causal-approximation must be prefix, got {approximation}")
