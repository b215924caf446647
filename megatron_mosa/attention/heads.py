"""Dense and MoSA heads of one tensor-parallel rank. No communication here: the hybrid layer does it once for both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention.config import MosaTransformerConfig
from megatron_mosa.attention.recompute import is_repetition
from megatron_mosa.kernels import Documents, get_backend, naive
from megatron_mosa.kernels.autocast import autocast_operands
from megatron_mosa.kernels.documents import document_attention
from megatron_mosa.kernels.naive import HISTOGRAM_BINS
from megatron_mosa.kernels.window import sliding_window_attention

THRESHOLD_BUFFERS = ("thresholds", "threshold_updates")


class PartitionedHeads(MegatronModule):
    """Heads whose every parameter is partitioned over the tensor-parallel group along one dimension."""

    config: MosaTransformerConfig

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.partition_dims: dict[str, int] = {}
        self.initialisers: dict[str, Callable[..., object]] = {}

    def add_weight(
        self,
        name: str,
        global_shape: tuple[int, ...],
        partition_dim: int,
        initialise: Callable[..., object],
    ) -> None:
        """Register this rank's slice of a weight, initialised as a function of the global shape and the seed.

        Every rank draws the global weight from the default generator of its device, which is seeded alike across the
        tensor-parallel group, and keeps its slice: the model does not depend on the tensor-parallel size.
        """
        config, size = self.config, self.tp_group.size()
        shape = list(global_shape)
        shape[partition_dim] //= size
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            master = torch.empty(global_shape, device=device)
            initialise(master)
            weight.data.copy_(master.chunk(size, dim=partition_dim)[self.tp_group.rank()])
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=1)
        self.register_parameter(name, weight)
        self.partition_dims[name] = partition_dim
        self.initialisers[name] = initialise

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Megatron's distributed-checkpoint view: every weight sharded along its partitioned dimension."""
        groups = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.partition_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=groups["dp_cp_group"],
        )


class CausalHeads(PartitionedHeads):
    """Causal attention over all tokens before; weights laid out as Megatron's linear_qkv and linear_proj.

    Args:
        heads, groups: over all tensor-parallel ranks; each of the groups shares one key and one value head.
    """

    qkv_weight: torch.nn.Parameter  # [G / tp * (H / G + 2) h', h]
    proj_weight: torch.nn.Parameter  # [h, H / tp * h']

    def __init__(
        self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup, heads: int, groups: int
    ) -> None:
        super().__init__(config, tp_group)
        head_dim, width = config.head_dim, config.hidden_size
        init, output_init = cast(Any, config.init_method), cast(Any, config.output_layer_init_method)  # never None
        self.queries_per_group = heads // groups
        # rows: the queries, the key and the value of group 0, then of group 1, ...
        self.add_weight("qkv_weight", (groups * (self.queries_per_group + 2) * head_dim, width), 0, init)
        self.add_weight("proj_weight", (width, heads * head_dim), 1, output_init)

    def forward(self, hidden_states: Tensor, documents: Documents | None = None, kernels: ModuleType = naive) -> Tensor:
        """[T, B, h] to [T, B, h]: this rank's part of the sum over heads.

        Args:
            kernels: whose ``split_heads`` takes the projection apart.
        """
        length, batch, _ = hidden_states.shape
        config, queries = self.config, self.queries_per_group
        qkv = F.linear(hidden_states, self.qkv_weight).view(length, batch, -1, queries + 2, config.head_dim)
        starts = documents.starts if documents is not None and config.mosa_restart_rotary else None
        query, key, value = kernels.split_heads(qkv, config.mosa_rotary_percent, config.mosa_rotary_base, starts)
        attended = self.attend(query, key, value, documents)  # [B, H, T, h']
        return F.linear(attended.permute(2, 0, 1, 3).flatten(2), self.proj_weight)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """[B, H, T, h'] from queries [B, H, T, h'] and keys and values [B, G, T, h']; no T x T matrix anywhere."""
        raise NotImplementedError("abstract")


class DenseHeads(CausalHeads):
    """Every token before (in the document) is a key: torch's fused attention."""

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config, tp_group, config.num_attention_heads, cast(int, config.num_query_groups))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """As CausalHeads."""
        if documents is not None:
            return document_attention(query, key, value, documents)
        grouped = self.queries_per_group > 1
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


class LocalHeads(CausalHeads):
    """The last ``mosa_local_window`` tokens are keys, the token itself included."""

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config, tp_group, config.num_local_heads, config.num_local_heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
        """As CausalHeads."""
        return sliding_window_attention(query, key, value, self.config.mosa_local_window, documents)


class MosaHeads(PartitionedHeads):
    """MoSA heads with expert choice or with thresholds, initialised as the authors do.

    With thresholds every forward pass in training counts its scores in ``histogram``, for ``update_thresholds``.
    """

    router_weight: torch.nn.Parameter  # [E / tp, h]
    qkv_weight: torch.nn.Parameter  # [E / tp, h, 3h']
    proj_weight: torch.nn.Parameter  # [E / tp, h', h]
    thresholds: Tensor  # fp32 [E / tp]
    threshold_updates: Tensor  # fp32 [E / tp]: how often they were updated
    histogram: Tensor  # int32 [E / tp, bins]: scores since the last update

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config, tp_group)
        heads, head_dim, width = config.num_mosa_heads, config.head_dim, config.hidden_size
        self.add_weight("router_weight", (heads, width), 0, _uniform(width**-0.5))
        self.add_weight("qkv_weight", (heads, width, 3 * head_dim), 0, _uniform((3 * head_dim) ** -0.5))
        self.add_weight("proj_weight", (heads, head_dim, width), 0, _uniform((width * heads) ** -0.5))
        if config.mosa_selection == "threshold":
            self._add_thresholds(heads // tp_group.size())
        self.load: Tensor | None = None  # fp32 [E / tp]: tokens above the threshold over T / rho, in the last batch
        self.records_selection = False
        # scores [B, E, T], indices [B, E, k] (T in empty places) of the last forward
        self.selection: tuple[Tensor, Tensor] | None = None
        self.dropped: Tensor | None = None  # [E / tp]: tokens above the thresholds that the capacity has left out there

    def forward(self, hidden_states: Tensor, documents: Documents | None = None) -> Tensor:
        """[T, B, h] to [T, B, h]: this rank's part of the sum over heads."""
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
        documents: Documents | None,
        kernels: ModuleType,
        counts: bool,
        above: bool,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The forward pass with what it depends on beside tensors; records nothing.

        Args:
            hidden_states: [T, B, h].
            documents: of the batch, or None.
            kernels: the backend.
            counts: whether scores are counted for the thresholds, if there are any.
            above: as ``selects_above`` says.
            indices: what an earlier call has selected of the same states, without documents; None: select.

        Returns:
            The output, [T, B, h], the scores, [B, E / tp, T], and the indices, [B, E / tp, k].
        """
        config = self.config
        states = hidden_states.transpose(0, 1)  # [B, T, h]
        scores = kernels.router_scores(states, self.router_weight)
        states, qkv_weight, proj_weight = autocast_operands(states, self.qkv_weight, self.proj_weight)
        slots = None
        if indices is None:
            if counts and config.mosa_selection == "threshold":
                kernels.count_scores(scores, self.histogram)
            indices, slots = self._select(kernels, scores, documents, above)
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
        )
        return output.transpose(0, 1), scores, indices

    def _select(
        self, kernels: ModuleType, scores: Tensor, documents: Documents | None, above: bool
    ) -> tuple[Tensor, Documents | None]:
        """Indices [B, E / tp, k], and the slots as packed documents where a number of each document was selected."""
        config, length = self.config, scores.shape[-1]
        starts = None if documents is None else documents.starts
        if above:
            capacity = config.capacity(length) if self.training else None
            return kernels.select_above(scores, self.thresholds, capacity, starts, *self._feedback), None
        quotas, slots, num_selected = None, None, config.num_selected(length)
        if documents is not None and config.mosa_selection_scope == "document":
            selection = documents.selection(config.num_selected)
            quotas, slots, num_selected = selection.quotas, selection.slots, selection.num_slots
        includes_first = config.mosa_include_first_token or config.mosa_selection == "threshold"
        return kernels.select_tokens(scores, num_selected, includes_first, starts, quotas), slots

    def _dropped(self, kernels: ModuleType, scores: Tensor, indices: Tensor, documents: Documents | None) -> Tensor:
        if not self.selects_above(self.training):
            return scores.new_zeros(scores.shape[1])
        starts = None if documents is None else documents.starts
        above = kernels.count_above(scores, self.thresholds, starts, *self._feedback)  # [B, E]
        return above.sum(0) - (indices < scores.shape[-1]).sum((0, 2))

    @property
    def _feedback(self) -> tuple[float, float]:
        """Of a head's load to its threshold, and the load to be held."""
        return self.config.mosa_load_feedback, 1 / self.config.mosa_sparsity

    def selects_above(self, training: bool) -> bool:
        """Whether tokens above the thresholds are taken, not the k best: in training when the warm-up is over, else as
        soon as the thresholds were updated once."""
        if self.config.mosa_selection != "threshold":
            return False
        return self._num_updates() >= (self.config.mosa_threshold_warmup_steps if training else 1)

    def _num_updates(self) -> int:
        """Known to the host until the buffer is changed by others: no forward pass waits for the device."""
        updates = self.threshold_updates
        if self._counted[:2] != (id(updates), updates._version):
            self._counted = id(updates), updates._version, int(updates.min())
        return self._counted[2]

    def _add_thresholds(self, heads: int) -> None:
        device = torch.device("cpu") if self.config.use_cpu_initialization else torch.cuda.current_device()
        for name in THRESHOLD_BUFFERS:
            # Made of integers: in its construction of models ZeRO-3 makes bf16 of new tensors in fp32.
            self.register_buffer(name, torch.zeros(heads, dtype=torch.int32, device=device).float())
            self.partition_dims[name] = 0
        counts = torch.zeros(heads, HISTOGRAM_BINS, dtype=torch.int32, device=device)
        self.register_buffer("histogram", counts, persistent=False)
        self._counted = 0, 0, 0  # the buffer's identity and version, and its value then

    def update(self, thresholds: Tensor, load: Tensor) -> None:
        """Take over new thresholds [E / tp], and count the update; ``load`` [E / tp] is what the old ones took."""
        updates = self._num_updates() + 1
        self.thresholds.copy_(thresholds)
        self.threshold_updates += 1
        self._counted = id(self.threshold_updates), self.threshold_updates._version, updates
        self.histogram.zero_()
        self.load = load

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MosaHeads:
        """As Module, but the thresholds of a model that becomes bf16 stay fp32."""
        kept = {name: self._buffers[name] for name in THRESHOLD_BUFFERS if name in self._buffers}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if buffer is not None and moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self


def _uniform(bound: float) -> Callable[..., object]:
    return partial(torch.nn.init.uniform_, a=-bound, b=bound)
