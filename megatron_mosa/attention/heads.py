"""What heads of all kinds have in common.

A module of heads computes those of one tensor-parallel rank; the hybrid layer does the communication, once for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_mosa.attention.config import MosaTransformerConfig
from megatron_mosa.kernels import AnyDocuments, KernelBackend

SELECTION_BUFFERS = ("thresholds", "threshold_updates", "head_bias", "centroids")
"""What heads select by besides their weights, which checkpoints contain: of MoSA and Routing heads."""


class Contribution(NamedTuple):
    """What the heads of one kind return to a compiled layer."""

    output: Tensor
    """The addend plus this rank's part of the sum over heads, [T, B, h]."""

    states: Tensor
    """The given states, for the heads of the next kind."""

    selected: Tensor | None = None
    """What a repetition must not decide anew; None: nothing."""

    scores: Tensor | None = None
    """What ``keep`` takes."""


class PartitionedHeads(MegatronModule):
    """Attention heads whose parameters are all partitioned over the tensor-parallel group, along one dimension each."""

    config: MosaTransformerConfig

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.partition_dims: dict[str, int] = {}
        self.initializers: dict[str, Callable[..., object]] = {}

    def add_weight(
        self,
        name: str,
        global_shape: tuple[int, ...],
        partition_dim: int,
        initialize: Callable[..., object],
    ) -> None:
        """Register this rank's slice of a weight, initialized as a function of the global shape and the seed.

        Every rank draws the global weight from the default generator of its device, which has the same seed on all
        ranks of the tensor-parallel group, and keeps its slice: the model does not depend on the tensor-parallel size.
        """
        config, size = self.config, self.tp_group.size()
        shape = list(global_shape)
        shape[partition_dim] //= size
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            master = torch.empty(global_shape, device=device)
            initialize(master)
            weight.data.copy_(master.chunk(size, dim=partition_dim)[self.tp_group.rank()])
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=1)
        self.register_parameter(name, weight)
        self.partition_dims[name] = partition_dim
        self.initializers[name] = initialize

    def add_state(
        self, name: str, global_shape: tuple[int, ...], initialize: Callable[..., object] | None = None
    ) -> None:
        """Register this rank's slice of an fp32 buffer, partitioned along its first dimension.

        It is 0, or drawn by ``initialize`` like a weight. State dicts contain it if it is in ``SELECTION_BUFFERS``.
        """
        config, size = self.config, self.tp_group.size()
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        # Created as integers, because ZeRO-3 converts new fp32 tensors to bf16 while a model is constructed.
        whole = torch.zeros(global_shape, dtype=torch.int32, device=device).float()
        if initialize is not None:
            self.initializers[name] = initialize
            if config.perform_initialization:
                initialize(whole)
        own = whole.chunk(size)[self.tp_group.rank()].clone()
        self.register_buffer(name, own, persistent=name in SELECTION_BUFFERS)
        if name in SELECTION_BUFFERS:
            self.partition_dims[name] = 0

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
        """Compute the forward pass of training as a function of its arguments, for compiled layers.

        Args:
            hidden_states: [T, B, h].
            documents: the documents of the batch; None: each sequence is one document.
            kernels: the backend.
            above: MoSA heads select by their thresholds, not by expert choice.
            selected: what an earlier call with the same states returned, in a repetition for backward; else None.
            addend: [T, B, h], what the heads of all kinds before this one contribute; None: this is the first kind.
            is_last: no other kind follows.
        """
        raise NotImplementedError("abstract")

    def keep(self, scores: Tensor | None) -> None:
        """Keep what statistics need of the scores that ``contribute`` returned."""

    def is_causal(self, training: bool) -> bool:
        """Return whether no output depends on later tokens, in training or in evaluation."""
        return True

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Return the tensors for Megatron's distributed checkpoint, sharded along their partitioned dimensions."""
        groups = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.partition_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=groups["dp_cp_group"],
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartitionedHeads:
        """Keep fp32 buffers in fp32 when the model is converted to another type, such as bf16."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if buffer.dtype == torch.float32 and moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self
