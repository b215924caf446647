"""Activation recompute that keeps the selected tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron_mosa.attention.config import MosaTransformerConfig

_SELECTIONS = {f"megatron_mosa::{name}" for name in (
    "select_tokens", "fused_select_tokens", "select_above", "fused_select_above",
)}  # fmt: skip
_is_repetition: ContextVar[bool] = ContextVar("is_repetition", default=False)


def is_repetition() -> bool:
    """Return whether this forward pass is a repetition, whose scores the first pass has already counted."""
    return _is_repetition.get()


def recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` without keeping its activations; backward calls it again, including its collectives.

    The selected indices are kept from the first call: selecting again, from scores with other rounding errors, would
    give gradients of a different function.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts, **kwargs)


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of the first forward pass and of its repetition."""
    first, again = create_selective_checkpoint_contexts(_keep_selection)
    return first, _repeated(again)


@contextmanager
def _repeated(again: AbstractContextManager[Any]) -> Iterator[None]:
    token = _is_repetition.set(True)
    try:
        with again:
            yield
    finally:
        _is_repetition.reset(token)


def _keep_selection(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if isinstance(op, torch._ops.OpOverload) and op.name() in _SELECTIONS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class MosaTransformerLayer(TransformerLayer):
    """Megatron's layer, recomputed as a whole if ``mosa_recompute`` is "full".

    Megatron's own recompute (``recompute_granularity``) would select again, and needs CUDA for its random-number
    tracker.
    """

    config: MosaTransformerConfig

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Positional, unlike in Megatron's calls: else ZeRO-3, to which a layer is one module, does not see when the
        # backward pass of the layer ends, and reduces gradients before they are there.
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, *args: Any, compiled: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Run the layer.

        Args:
            args, kwargs: as Megatron's layer takes them, or as ``compiled`` does.
            compiled: a ``DecoderLayer`` of this layer, to run in place of Megatron's code. It runs within this call
                because ZeRO-3 gathers the layer's weights around it.
        """
        if compiled is not None:
            return compiled(*args, **kwargs)
        if self.config.mosa_recompute == "full" and self.training:
            return recomputed(super().forward, *args, **kwargs)
        return super().forward(*args, **kwargs)
