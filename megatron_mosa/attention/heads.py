"""Dense and MoSA heads of one tensor-parallel rank. No communication here: the hybrid layer does it once for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention.config import MosaTransformerConfig
from megatron_mosa.kernels import get_backend
from megatron_mosa.kernels.naive import apply_rotary


class PartitionedHeads(MegatronModule):
    """Heads whose every parameter is partitioned over the tensor-parallel group along one dimension."""

    config: MosaTransformerConfig

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.partition_dims: dict[str, int] = {}
        self.initialisers: dict[str, Callable[[Tensor], object]] = {}

    def add_weight(
        self,
        name: str,
        global_shape: tuple[int, ...],
        partition_dim: int,
        initialise: Callable[[Tensor], object],
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


class DenseHeads(PartitionedHeads):
    """Causal dense attention over torch's fused SDPA; weights laid out as Megatron's linear_qkv and linear_proj."""

    qkv_weight: torch.nn.Parameter  # [H / tp * 3h', h]
    proj_weight: torch.nn.Parameter  # [h, H / tp * h']

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config, tp_group)
        heads, head_dim, width = config.num_attention_heads, config.head_dim, config.hidden_size
        # rows: q, k, v of head 0, then of head 1, ...
        init, output_init = cast(Any, config.init_method), cast(Any, config.output_layer_init_method)  # never None
        self.add_weight("qkv_weight", (heads * 3 * head_dim, width), 0, init)
        self.add_weight("proj_weight", (width, heads * head_dim), 1, output_init)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, B, h] to [T, B, h]: this rank's part of the sum over heads."""
        length, batch, _ = hidden_states.shape
        config = self.config
        qkv = F.linear(hidden_states, self.qkv_weight).view(length, batch, -1, 3, config.head_dim)
        query, key, value = qkv.permute(3, 1, 2, 0, 4)  # each [B, H, T, h']
        positions = torch.arange(length, device=hidden_states.device)
        query = apply_rotary(query, positions, config.mosa_rotary_percent, config.mosa_rotary_base)
        key = apply_rotary(key, positions, config.mosa_rotary_percent, config.mosa_rotary_base)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, H, T, h']
        return F.linear(attended.permute(2, 0, 1, 3).flatten(2), self.proj_weight)


class MosaHeads(PartitionedHeads):
    """MoSA heads with expert choice, initialised as the authors do."""

    router_weight: torch.nn.Parameter  # [E / tp, h]
    qkv_weight: torch.nn.Parameter  # [E / tp, h, 3h']
    proj_weight: torch.nn.Parameter  # [E / tp, h', h]

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config, tp_group)
        heads, head_dim, width = config.num_mosa_heads, config.head_dim, config.hidden_size
        self.add_weight("router_weight", (heads, width), 0, _uniform(width**-0.5))
        self.add_weight("qkv_weight", (heads, width, 3 * head_dim), 0, _uniform((3 * head_dim) ** -0.5))
        self.add_weight("proj_weight", (heads, head_dim, width), 0, _uniform((width * heads) ** -0.5))
        self.kernels = get_backend(config.mosa_backend)
        self.records_selection = False
        self.selection: tuple[Tensor, Tensor] | None = None  # scores [B, E, T], indices [B, E, k] of the last forward

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, B, h] to [T, B, h]: this rank's part of the sum over heads."""
        config = self.config
        states = hidden_states.transpose(0, 1)  # [B, T, h]
        scores = self.kernels.router_scores(states, self.router_weight)
        indices = self.kernels.select_tokens(
            scores, config.num_selected(states.shape[1]), config.mosa_include_first_token
        )
        if self.records_selection:
            self.selection = scores.detach(), indices
        output = self.kernels.selected_attention(
            states,
            scores,
            indices,
            self.qkv_weight,
            self.proj_weight,
            rotary_percent=config.mosa_rotary_percent,
            rotary_base=config.mosa_rotary_base,
        )
        return output.transpose(0, 1)


def _uniform(bound: float) -> Callable[[Tensor], object]:
    return lambda weight: torch.nn.init.uniform_(weight, -bound, bound)
