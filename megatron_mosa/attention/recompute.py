"""Activation recompute that never selects twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron_mosa.attention.config import MosaTransformerConfig

_SELECTIONS = {f"megatron_mosa::{name}" for name in (
    "select_tokens", "fused_select_tokens", "select_above", "fused_select_above",
)}  # fmt: skip
_repeats: ContextVar[bool] = ContextVar("repeats", default=False)


def is_repetition() -> bool:
    """Whether this forward pass is one that backward does again: what the first has counted is not to count twice."""
    return _repeats.get()


def recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` without keeping its activations; backward calls it again, collectives included.

    The selected indices are kept from the first call: a second selection from scores that rounding has moved would
    give the gradients of another function.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts, **kwargs)


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the first forward pass, and of its repetition."""
    first, again = create_selective_checkpoint_contexts(_keep_selection)
    return first, _both(again)


@contextmanager
def _both(again: AbstractContextManager[Any]) -> Iterator[None]:
    with repetition(), again:
        yield


@contextmanager
def repetition() -> Iterator[None]:
    """Forward passes in here are made a second time: they count no scores."""
    token = _repeats.set(True)
    try:
        yield
    finally:
        _repeats.reset(token)


def _keep_selection(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if isinstance(op, torch._ops.OpOverload) and op.name() in _SELECTIONS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class MosaTransformerLayer(TransformerLayer):
    """Megatron's layer, recomputed as a whole if ``mosa_recompute`` is "full".

    Megatron's own recompute (``recompute_granularity``) runs its random-number tracker, which needs CUDA, and would
    select again.
    """

    config: MosaTransformerConfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLayer."""
        if self.config.mosa_recompute == "full" and self.training:
            return recomputed(super().forward, *args, **kwargs)
        return super().forward(*args, **kwargs)
