"""What ``mosa generate`` does: a prompt, and what the model goes on with, as it comes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mosa.decode.opening import check_thresholds, open_model
from megatron_mosa.errors import UserError
from megatron_mosa.hf.modeling_mosa import MosaForCausalLM


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float
    """0: always the most likely."""

    top_k: int
    """Only these many most likely; 0: all."""

    top_p: float
    """Only the most likely that together have this probability."""

    seed: int

    def __post_init__(self) -> None:
        """Refuse numbers out of range, by their option."""
        for name, allowed, text in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (the most likely token) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
        ):
            if not allowed:
                raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)} is out of range; expected {text}")

    def options(self) -> dict[str, Any]:
        """For ``generate`` of transformers."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from one of the two; the file "-" is the standard input.

    Raises:
        UserError: none, both, an empty one, or a file that is not text.
    """
    if (prompt is None) == (file is None):
        raise UserError("give either --prompt TEXT or --prompt-file FILE (- for the standard input)")
    if file is not None:
        try:
            prompt = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no UTF-8 text"
            raise UserError(f"--prompt-file={file} cannot be read: {reason}; give a file of text") from None
    if not prompt:
        raise UserError(f"--{'prompt-file' if file else 'prompt'} is empty; expected text of one token or more")
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
    """Print what the model goes on with, as it comes; see ``open_model`` for what ``path`` may be.

    Raises:
        UserError: expert choice without an approximation, thresholds that are not calibrated, no tokenizer.
    """
    from transformers import TextStreamer

    model, words = open_model(path, device, dtype, tokenizer)
    _check(model, path, causal_approximation)
    if words is None:
        raise UserError(f"'{path}' has no tokenizer.json; export it again, with its tokenizer")
    ids = words(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)  # [1, T]
    if ids.shape[1] == 0:
        raise UserError("--prompt has no tokens; expected text of one token or more")
    torch.manual_seed(sampling.seed)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=TextStreamer(words, skip_prompt=True, skip_special_tokens=True),
        causal_approximation=causal_approximation,
        **sampling.options(),
    )


def _check(model: MosaForCausalLM, path: Path, approximation: str | None) -> None:
    if model.config.can_decode:
        if approximation is not None:
            raise UserError(f"--causal-approximation={approximation}: '{path}' is causal without it; leave it out")
        check_thresholds(model, path)
    elif approximation is None:
        raise UserError(
            f"'{path}' selects by expert choice (mosa.selection), with the whole sequence in view, so no token can be "
            "decoded before the next are known; expected --causal-approximation prefix (selects in the prefix anew for "
            "every token: slow, and not what was trained), what mosa checkpoint causalize makes of it, or a "
            "model trained with mosa.selection=threshold"
        )
    elif approximation != "prefix":
        raise UserError(f"--causal-approximation={approximation} is not known; expected prefix")
