"""Checks of the arguments of a MoSA model's methods in transformers: what exists there and has no meaning here."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from inspect import signature
from typing import Any

from torch import Tensor

from .configuration_mosa import MosaConfig

# Arguments that transformers and PEFT may pass to any model, but this one does not support.
UNSUPPORTED = {
    "position_ids": "positions follow from attention_mask and the cache",
    "output_attentions": "the kernels do not keep attention weights",
    "token_type_ids": "all tokens are of one kind",
}
IGNORED = ("cache_position",)  # the cache knows it
TOKENIZERS = ("tokenizer", "assistant_tokenizer")  # generate reads them itself, but passes them on to forward, too
NO_DRAFTS = "a MosaCache cannot remove the tokens of a rejected draft"
# Options of generate that this model does not support.
UNSUPPORTED_OPTIONS = {
    "cache_implementation": "heads that select tokens store them in a MosaCache, which generate creates itself",
    "assistant_model": NO_DRAFTS,
    "assistant_early_exit": NO_DRAFTS,
    "prompt_lookup_num_tokens": NO_DRAFTS,
    "use_mtp": NO_DRAFTS,
}


def parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of a method's arguments."""
    return [name for name in signature(function).parameters if name not in ("self", "others", "args", "kwargs")]


def did_you_mean(name: str, known: list[str]) -> str:
    """Return "did you mean 'x'?" for the known name most similar to ``name``, or an empty string."""
    similar = get_close_matches(name, known, n=1)
    return f"did you mean '{similar[0]}'?" if similar else ""


def unsupported(name: str) -> str:
    """Return why an argument of ``UNSUPPORTED`` is refused, and what to do."""
    return f"{name} is not supported: {UNSUPPORTED[name]}; omit {name}"


def has_effect(name: str, value: Any) -> bool:
    """Return whether the value of an unsupported argument would have an effect if it were supported."""
    if name == "token_type_ids" and isinstance(value, Tensor):
        return bool(value.any())
    return value is not None and value is not False


def check_others(forward: Callable[..., Any], others: dict[str, Any], config: MosaConfig) -> None:
    """Check the arguments that ``forward`` does not name, so that a mistyped one is not ignored.

    Raises:
        TypeError: an argument does not exist.
        ValueError: an argument exists in transformers, but this model does not support it.
    """
    for name in UNSUPPORTED:
        value = others.get(name)
        if has_effect(name, getattr(config, name, None) if value is None else value):
            raise ValueError(unsupported(name))
    for name in others:
        if name not in UNSUPPORTED and name not in IGNORED:
            names = [*parameters(forward), "return_dict"]
            hint = did_you_mean(name, names) or f"it takes {', '.join(names)}"
            raise TypeError(f"forward() got an unexpected keyword argument '{name}'; {hint}")


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Check that ids [B, T] or embeddings [B, T, h] are given, of one token or more.

    Raises:
        ValueError: they are not.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass either input_ids or inputs_embeds, and not both")
    for name, inputs, sizes in (("input_ids", input_ids, "BT"), ("inputs_embeds", inputs_embeds, "BTh")):
        if inputs is not None and (inputs.dim() != len(sizes) or 0 in inputs.shape):
            raise ValueError(
                f"{name} must be of shape [{', '.join(sizes)}], with one sequence and one token or more, got "
                f"{list(inputs.shape)}"
            )
