"""MoSA heads: each selects its own tokens by a learned router (arXiv 2505.00315, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention.config import MosaTransformerConfig
from megatron_mosa.attention.functional import select
from megatron_mosa.attention.heads import Contribution, PartitionedHeads
from megatron_mosa.attention.recompute import is_repetition
from megatron_mosa.attention.token_choice import choose_heads
from megatron_mosa.kernels import HISTOGRAM_BINS, AnyDocuments, Documents, KernelBackend, autocast_operands, get_backend
from megatron_mosa.parallel import gather_first_dim


class MosaHeads(PartitionedHeads):
    """MoSA heads with expert choice, thresholds or token choice, initialized like the authors' code.

    For ``update_thresholds``, every forward pass in training adds its scores to ``histogram`` with thresholds, and its
    choices to ``choices`` with token choice.
    """

    router_weight: torch.nn.Parameter  # [E / tp, h]
    qkv_weight: torch.nn.Parameter  # [E / tp, h, 3h']
    proj_weight: torch.nn.Parameter  # [E / tp, h', h]
    thresholds: Tensor  # fp32 [E / tp]
    threshold_updates: Tensor  # fp32 [E / tp]: number of updates
    histogram: Tensor  # int32 [E / tp, bins]: scores since the last update
    head_bias: Tensor  # fp32 [E / tp]: added to the scores for token choice
    choices: Tensor  # int32 [E / tp + 1]: tokens that took each head, and all tokens, since the last update

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config, tp_group)
        heads, head_dim, width = config.num_mosa_heads, config.head_dim, config.hidden_size
        self.add_weight("router_weight", (heads, width), 0, _uniform(width**-0.5))
        self.add_weight("qkv_weight", (heads, width, 3 * head_dim), 0, _uniform((3 * head_dim) ** -0.5))
        self.add_weight("proj_weight", (heads, head_dim, width), 0, _uniform((width * heads) ** -0.5))
        if config.mosa_selection == "threshold":
            self._add_thresholds(heads)
        elif config.mosa_selection == "token_choice":
            self._add_biases(heads)
        # fp32 [E / tp]: share of the last batch's tokens above the threshold, or that took the head, over its target
        self.load: Tensor | None = None
        self.records_selection = False
        # Of the last recorded forward pass: scores [B, E, T] and indices [B, E, k] (T in empty slots).
        self.selection: tuple[Tensor, Tensor] | None = None
        self.dropped: Tensor | None = None  # [E / tp]: tokens that the capacity dropped there
        self._kept: Tensor | None = None  # [1, E / tp, T]: scores of the last forward pass of a compiled layer

    def forward(self, hidden_states: Tensor, documents: AnyDocuments | None = None) -> Tensor:
        """Compute this rank's part of the sum over heads: [T, B, h] from [T, B, h]."""
        kernels = get_backend(self.config.mosa_backend, hidden_states, self.config.head_dim)
        counts, above = self.training and not is_repetition(), self.selects_above(self.training)
        output, scores, indices = self.attend(hidden_states, documents, kernels, counts, above)
        if self.records_selection:
            self.selection = scores.detach(), indices
            self.dropped = self._dropped(kernels, scores, indices, documents)
        return output

    def attend(
        self,
        hidden_states: Tensor,
        documents: AnyDocuments | None,
        kernels: KernelBackend,
        counts: bool,
        above: bool,
        indices: Tensor | None = None,
        addend: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the forward pass as a function of its arguments; records nothing.

        Args:
            hidden_states: [T, B, h].
            documents: the documents of the batch; None: each sequence is one document.
            kernels: the backend.
            counts: whether scores are added to the histogram, if the heads have thresholds.
            above: whether tokens are selected by thresholds, see ``selects_above``.
            indices: the selection of an earlier call with the same states, never one per document; None: select.
            addend: [T, B, h], added to the output.

        Returns:
            The output [T, B, h], the scores [B, E / tp, T] and the indices [B, E / tp, k].
        """
        config = self.config
        states = hidden_states.transpose(0, 1)  # [B, T, h]
        scores = kernels.router_scores(states, self.router_weight)
        states, qkv_weight, proj_weight = autocast_operands(states, self.qkv_weight, self.proj_weight)
        slots = None
        if indices is None:
            keys, thresholds = self._keys(scores, above)
            if counts and config.mosa_selection == "threshold":
                kernels.count_scores(scores, self.histogram)
            if counts and config.mosa_selection == "token_choice":
                self.choices.add_(F.pad(keys.sum((0, 2), dtype=torch.int32), (0, 1), value=keys[:, 0].numel()))
            indices, slots = self._select(kernels, keys, thresholds, documents)
        output = kernels.selected_attention(
            states,
            self.router_weight,
            scores,
            indices,
            qkv_weight,
            proj_weight,
            rotary_percent=config.mosa_rotary_percent,
            rotary_base=config.mosa_rotary_base,
            document_starts=None if documents is None else documents.starts,
            restart_rotary=config.mosa_restart_rotary,
            slots=slots,
            is_full=not (above or self._per_document(documents) or config.mosa_selection == "token_choice"),
            addend=None if addend is None else addend.transpose(0, 1),
        )
        return output.transpose(0, 1), scores, indices

    def contribute(
        self,
        hidden_states: Tensor,
        documents: AnyDocuments | None,
        kernels: KernelBackend,
        above: bool,
        selected: Tensor | None,
        addend: Tensor | None,
        is_last: bool,
    ) -> Contribution:
        output, scores, indices = self.attend(hidden_states, documents, kernels, True, above, selected, addend)
        return Contribution(output, hidden_states, indices, scores.detach())

    @torch.no_grad()
    def keep(self, scores: Tensor | None) -> None:
        """Keep the scores [B, E / tp, T] of the first sequence, at a fixed address, so that a graph can do it."""
        assert scores is not None
        if self._kept is None or self._kept.shape[1:] != scores.shape[1:]:
            self._kept = torch.empty_like(scores[:1])
        self._kept.copy_(scores[:1])

    @torch.no_grad()
    def record_kept(self, documents: Documents | None) -> None:
        """Record what was selected by the kept scores, which selects once more; as in training.

        A collective over the tensor-parallel group, with token choice.

        Args:
            documents: of the kept sequence.
        """
        assert self._kept is not None
        kernels = get_backend(self.config.mosa_backend, self.router_weight, self.config.head_dim)
        keys, thresholds = self._keys(self._kept, self.selects_above(training=True))
        indices, _ = self._select(kernels, keys, thresholds, documents)
        self.selection = self._kept.clone(), indices
        self.dropped = self._dropped(kernels, self._kept, indices, documents)

    def _select(
        self, kernels: KernelBackend, keys: Tensor, thresholds: Tensor | None, documents: AnyDocuments | None
    ) -> tuple[Tensor, Documents | None]:
        """Return the indices [B, E / tp, k] of the tokens that the keys [B, E / tp, T] select; see ``select``."""
        config, length = self.config, keys.shape[-1]
        return select(
            kernels,
            keys,
            config.num_selected if self._per_document(documents) else config.num_selected(length),
            thresholds=thresholds,
            capacity=config.capacity(length) if self.training else None,
            feedback=config.load_feedback,
            share=1 / config.mosa_sparsity,
            include_first_token=config.mosa_include_first_token or config.mosa_selection != "expert_choice",
            documents=documents,
        )

    def _per_document(self, documents: AnyDocuments | None) -> bool:
        return documents is not None and self.config.mosa_selection_scope == "document"

    def _dropped(
        self, kernels: KernelBackend, scores: Tensor, indices: Tensor, documents: AnyDocuments | None
    ) -> Tensor:
        keys, thresholds = self._keys(scores, self.selects_above(self.training))
        if thresholds is None:
            return scores.new_zeros(scores.shape[1])
        starts = None if documents is None else documents.starts
        feedback, share = self.config.load_feedback, 1 / self.config.mosa_sparsity
        above = kernels.count_above(keys, thresholds, starts, feedback, share)  # [B, E]
        return above.sum(0) - (indices < scores.shape[-1]).sum((0, 2))

    def selects_above(self, training: bool) -> bool:
        """Return whether tokens are selected by thresholds rather than by expert choice.

        In training this begins after the warm-up, in evaluation after the first update of the thresholds.
        """
        if self.config.mosa_selection != "threshold":
            return False
        return self._num_updates() >= (self.config.mosa_threshold_warmup_steps if training else 1)

    def _keys(self, scores: Tensor, above: bool) -> tuple[Tensor, Tensor | None]:
        """Return what decides the selection, [B, E / tp, T], and the thresholds [E / tp] that it must exceed.

        Without thresholds, each head selects its largest keys. The keys of token choice are 1 where the token takes the
        head, else 0; a collective over the tensor-parallel group.
        """
        if self.config.mosa_selection != "token_choice":
            return scores, self.thresholds if above else None
        size, rank = self.tp_group.size(), self.tp_group.rank()
        whole = gather_first_dim(scores.transpose(0, 1), self.tp_group).transpose(0, 1)  # [B, E, T]
        chosen = choose_heads(whole, gather_first_dim(self.head_bias, self.tp_group), self.config.heads_per_token)
        keys = chosen.chunk(size, dim=1)[rank].to(scores.dtype).contiguous()
        return keys, keys.new_full(keys.shape[1:2], 0.5)

    def is_causal(self, training: bool) -> bool:
        return self.config.mosa_selection == "token_choice" or self.selects_above(training)

    def _num_updates(self) -> int:
        """Return the number of updates, cached until the buffer changes, so that forward passes do not synchronize."""
        updates = self.threshold_updates
        if updates.is_inference():  # its changes are not counted
            return int(updates.min())
        if self._counted[:2] != (id(updates), updates._version):
            self._counted = id(updates), updates._version, int(updates.min())
        return self._counted[2]

    def _add_thresholds(self, heads: int) -> None:
        for name in ("thresholds", "threshold_updates"):
            self.add_state(name, (heads,))
        counts = torch.zeros(
            heads // self.tp_group.size(), HISTOGRAM_BINS, dtype=torch.int32, device=self.thresholds.device
        )
        self.register_buffer("histogram", counts, persistent=False)
        self._counted = 0, 0, 0  # identity and version of threshold_updates, and its value at that version

    def _add_biases(self, heads: int) -> None:
        self.add_state("head_bias", (heads,))
        counts = torch.zeros(heads // self.tp_group.size() + 1, dtype=torch.int32, device=self.head_bias.device)
        self.register_buffer("choices", counts, persistent=False)

    def update(self, thresholds: Tensor, load: Tensor) -> None:
        """Set new thresholds [E / tp] and count the update; ``load`` [E / tp] is the load under the old ones."""
        updates = self._num_updates() + 1
        self.thresholds.copy_(thresholds)
        self.threshold_updates += 1
        self._counted = id(self.threshold_updates), self.threshold_updates._version, updates
        self.histogram.zero_()
        self.load = load


def _uniform(bound: float) -> Callable[..., object]:
    return partial(torch.nn.init.uniform_, a=-bound, b=bound)
