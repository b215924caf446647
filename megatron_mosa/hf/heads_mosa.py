"""The attention of a layer: the sum of its heads of all kinds, which are in files of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .cache_mosa import MosaCacheLayer
from .configuration_mosa import MosaConfig
from .dense_mosa import MosaCausalHeads
from .fixed_mosa import MosaFixedHeads
from .graph_mosa import Branch
from .routing_mosa import MosaRoutingHeads
from .sparse_mosa import MosaHeads
from .tokens_mosa import Column, Tokens

# The module of all heads of a kind in a layer.
HEADS: dict[str, Callable[[MosaConfig], nn.Module]] = {
    "dense": lambda config: MosaCausalHeads(config, config.num_dense_heads, config.num_key_value_heads),
    "local": lambda config: MosaCausalHeads(
        config, config.num_local_heads, config.num_local_heads, config.local_window
    ),
    "fixed": MosaFixedHeads,
    "routing": MosaRoutingHeads,
    "mosa": MosaHeads,
}


class MosaAttention(nn.Module):
    """The sum of a layer's heads of all kinds: ``dense_heads``, ``local_heads``, ...; None: there are none."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.mosa_heads: nn.Module | None
        for kind, create in HEADS.items():
            setattr(self, f"{kind}_heads", create(config) if getattr(config, f"num_{kind}_heads") else None)

    def forward(self, hidden_states: Tensor, tokens: Tokens, cache: MosaCacheLayer | None) -> Tensor:
        """Map [B, T, h] to [B, T, h]."""
        stored = {kind: None if cache is None else getattr(cache, kind) for kind in HEADS}
        prompt: dict[str, Any] = {}
        if isinstance(self.mosa_heads, MosaHeads):  # first: its counts have then reached the host when it needs them
            prompt = {"prompt": self.mosa_heads.start_prompt(hidden_states, tokens, stored["mosa"])}
        parts = [
            heads(hidden_states, tokens, stored[kind], **(prompt if kind == "mosa" else {}))
            for kind in HEADS
            if (heads := getattr(self, f"{kind}_heads")) is not None
        ]
        if cache is not None:
            cache.length += hidden_states.shape[1]
        return sum_of(parts)

    def can_step(self) -> bool:
        """Return whether ``step`` computes what ``forward`` does: all heads have a step, and no adapter around them.

        Fixed and Routing heads and token choice have no step that can be captured. PEFT may put adapters around heads.
        """
        return all(
            isinstance(heads, MosaCausalHeads) or (isinstance(heads, MosaHeads) and heads.thresholds is not None)
            for heads in self.children()
        )

    def step(
        self, hidden_states: Tensor, residual: Tensor, tokens: Tokens, cache: MosaCacheLayer, column: Column
    ) -> Tensor:
        """Map one token of each sequence, [B, 1, h] to [B, 1, h], and add the residual, as a step that can be captured.

        The kernels of MoSA heads run beside those of the other heads, if these leave room.
        """
        others = {kind: heads for kind in HEADS if isinstance(heads := getattr(self, f"{kind}_heads"), MosaCausalHeads)}
        total, parts = residual, []
        with Branch(residual.device, len(residual) * sum(heads.groups for heads in others.values())) as branch:
            if isinstance(self.mosa_heads, MosaHeads):
                assert cache.mosa is not None
                with branch.beside():
                    total = self.mosa_heads.step_in_kernels(hidden_states, tokens, cache.mosa, residual)
            for kind, heads in others.items():
                parts.append(heads.step(hidden_states, tokens, getattr(cache, kind), column))
        return total + sum_of(parts) if parts else total


def sum_of(parts: list[Tensor]) -> Tensor:
    """Return the sum of tensors, of which there is at least one."""
    output = parts[0]
    for part in parts[1:]:
        output = output + part
    return output
