"""A transformer layer in one plain function, which torch.compile makes one graph of, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_mosa.attention.heads import Contribution
from megatron_mosa.attention.recompute import MosaTransformerLayer
from megatron_mosa.kernels import KernelBackend, PackedDocuments
from megatron_mosa.parallel import TensorParallelRegion

OfHeads = tuple[Tensor | None, ...]
"""A tensor of the heads of each kind in a layer; None: they have none."""

Parameters = tuple[Tensor, ...]


class DecoderLayer(torch.nn.Module):
    """Computes what a ``MosaTransformerLayer`` does in training, with the parameters of that layer.

    Megatron's own layer does not compile in one piece. It takes documents as ``PackedDocuments``. A class, and not
    functions made for each layer, because all its instances share what is compiled.

    Args:
        layer: provides the parameters. Do not register this module in the model: the parameters would appear twice.
        following_norm: of the next layer, or the one after the last layer.
        kernels: the backend of the heads.
        region: the tensor-parallel region, whose collectives become part of the graph.
        backend: of torch.compile; None: nothing is compiled.
    """

    def __init__(
        self,
        layer: MosaTransformerLayer,
        following_norm: torch.nn.Module,
        kernels: KernelBackend,
        region: TensorParallelRegion,
        backend: str | None = "inductor",
    ) -> None:
        super().__init__()
        self.layer = layer
        self.following_norm = following_norm
        self.kernels = kernels
        self.region = region

        def compiled(part: Callable[..., Any]) -> Callable[..., Any]:
            return part if backend is None else torch.compile(part, dynamic=False, fullgraph=True, backend=backend)

        self._attention, self._mlp, self._whole = map(compiled, (self.attention, self.mlp, self.whole))
        self.enter_heads, self.heads_then_enter_mlp, self.mlp_then_enter_next = map(
            compiled, (self._enter_heads, self._heads_then_enter_mlp, self._mlp_then_enter_next)
        )

    def forward(self, hidden_states: Tensor, above: bool, documents: PackedDocuments | None = None) -> Tensor:
        """Run the layer; backward recomputes the part that ``mosa_recompute`` names.

        Args:
            hidden_states: [T, B, h], or [T / tensor-parallel size, B, h] under sequence parallelism.
            above: MoSA heads select by their thresholds, not by expert choice.
            documents: of the batch, if attention stays within them.

        Returns:
            Hidden states in the same shape.
        """
        recompute = self.layer.config.mosa_recompute
        if recompute == "attention":
            return self._mlp(self._recomputed(self._attention, hidden_states, above, documents))
        if recompute == "full":
            return self._recomputed(self._whole, hidden_states, above, documents)
        output, _, scores = self._whole(hidden_states, above, documents, None)
        self.keep(scores)
        return output

    def keep(self, scores: OfHeads) -> None:
        """Let the heads keep what statistics need; not compiled."""
        for heads, own in zip(self.layer.self_attention.heads, scores, strict=True):
            heads.keep(own)

    def whole(
        self, hidden_states: Tensor, above: bool, documents: PackedDocuments | None, selected: OfHeads | None
    ) -> tuple[Tensor, OfHeads, OfHeads]:
        """Return the output of the whole layer, and what its heads selected and by which scores."""
        hidden_states, selected, scores = self.attention(hidden_states, above, documents, selected)
        return self.mlp(hidden_states), selected, scores

    def attention(
        self, hidden_states: Tensor, above: bool, documents: PackedDocuments | None, selected: OfHeads | None
    ) -> tuple[Tensor, OfHeads, OfHeads]:
        """Add what the heads of all kinds contribute; ``selected`` is what they have selected before."""
        part, selected, scores = self._heads(self._enter_heads(hidden_states), above, documents, selected)
        return hidden_states + self.region.leave(part), selected, scores

    def mlp(self, hidden_states: Tensor) -> Tensor:
        """Add what the MLP contributes."""
        return hidden_states + self.region.leave(self._feed_forward(self._enter_mlp(hidden_states)))

    def _recomputed(
        self,
        part: Callable[..., tuple[Tensor, OfHeads, OfHeads]],
        hidden_states: Tensor,
        above: bool,
        documents: PackedDocuments | None,
    ) -> Tensor:
        """Run part of the layer without keeping its activations; backward repeats it with what was selected before.

        Reentrant, unlike ``recompute.recomputed``: what is compiled keeps other tensors when it is given a selection,
        which torch's other way of checkpointing does not allow, and its first pass need not keep any.
        """
        selected: list[OfHeads] = []

        def run(hidden_states: Tensor) -> Tensor:
            output, found, scores = part(hidden_states, above, documents, selected[0] if selected else None)
            if not selected:
                self.keep(scores)
                if any(indices is not None for indices in found):  # otherwise nothing is compiled for the repetition
                    selected.append(found)
            return output

        return cast(Tensor, checkpoint(run, hidden_states, use_reentrant=True, preserve_rng_state=False))

    # The same layer in pieces that begin where a collective has ended and end with two of them, for ``overlap``. Each
    # is given hidden states as they are outside of the region, what enters it, [T, B, h], and parameters of the norm
    # between, from ``TensorParallelRegion.all_outside``.

    def _heads_then_enter_mlp(
        self, hidden_states: Tensor, entered: Tensor, above: bool, norm: Parameters
    ) -> tuple[Tensor, Tensor, OfHeads]:
        part, _, scores = self._heads(entered, above, None, None)
        hidden_states = hidden_states + self.region.leave(part)
        return hidden_states, self._enter_mlp(hidden_states, norm), scores

    def _mlp_then_enter_next(self, hidden_states: Tensor, entered: Tensor, norm: Parameters) -> tuple[Tensor, Tensor]:
        hidden_states = hidden_states + self.region.leave(self._feed_forward(entered))
        return hidden_states, self.region.enter(_normalized(self.following_norm, hidden_states, norm))

    def _enter_heads(self, hidden_states: Tensor, norm: Parameters | None = None) -> Tensor:
        return self._enter(self.layer.input_layernorm, hidden_states, norm)

    def _enter_mlp(self, hidden_states: Tensor, norm: Parameters | None = None) -> Tensor:
        return self._enter(self.layer.pre_mlp_layernorm, hidden_states, norm)

    def _enter(self, norm: object, hidden_states: Tensor, parameters: Parameters | None) -> Tensor:
        if parameters is None:
            parameters = tuple([self.region.outside(parameter) for parameter in norm_parameters(norm)])
        return self.region.enter(_normalized(norm, hidden_states, parameters))

    def _heads(
        self, states: Tensor, above: bool, documents: PackedDocuments | None, selected: OfHeads | None
    ) -> tuple[Tensor, OfHeads, OfHeads]:
        kinds, output = self.layer.self_attention.heads, None
        found: list[Contribution] = []
        for number, heads in enumerate(kinds):
            before = None if selected is None else selected[number]
            is_last = number == len(kinds) - 1
            part = heads.contribute(states, documents, self.kernels, above, before, output, is_last)
            output, states = part.output, part.states
            found.append(part)
        return found[-1].output, tuple([part.selected for part in found]), tuple([part.scores for part in found])

    def _feed_forward(self, states: Tensor) -> Tensor:
        config, mlp = self.layer.config, self.layer.mlp
        states = F.linear(states, mlp.linear_fc1.weight)
        states = self.kernels.swiglu(states) if config.gated_linear_unit else config.activation_func(states)
        return F.linear(states, mlp.linear_fc2.weight)


def norm_parameters(norm: object) -> Parameters:
    """Return the weight of a norm, and the bias if it has one, [h] each."""
    if isinstance(norm, torch.nn.LayerNorm):
        return norm.weight, norm.bias
    assert isinstance(norm, torch.nn.RMSNorm)
    return (norm.weight,)


def _normalized(norm: object, states: Tensor, parameters: Parameters) -> Tensor:
    if isinstance(norm, torch.nn.LayerNorm):
        return F.layer_norm(states, norm.normalized_shape, *parameters, eps=norm.eps)
    assert isinstance(norm, torch.nn.RMSNorm)
    return F.rms_norm(states, norm.normalized_shape, *parameters, eps=norm.eps)
