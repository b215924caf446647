"""Heads of the Routing Transformer (arXiv 2003.05997), the paper's other sparse baseline (arXiv 2505.00315, section 4).

NOT causal: whether a cluster takes a token depends on the whole sequence, as in expert choice.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention.config import MosaTransformerConfig
from megatron_mosa.attention.functional import num_selected_tokens
from megatron_mosa.attention.heads import Contribution, PartitionedHeads
from megatron_mosa.attention.recompute import is_repetition
from megatron_mosa.kernels import AnyDocuments, KernelBackend, accumulation_dtype, get_backend, naive, without_autocast


class RoutingHeads(PartitionedHeads):
    """Heads that attend within clusters of similar tokens, found by online k-means.

    Query and key are the same vector, normalized. Each of a head's rho centroids takes the k = T / rho tokens nearest
    to it, and these attend among themselves, causally. A token's output is the mean over the clusters that took it, as
    in the authors' code, and 0 if none did.

    No gradient flows to the centroids. Every forward pass in training adds its tokens to ``cluster_sums``, from which
    ``update_thresholds`` moves the centroids after each optimizer step.
    """

    qv_weight: torch.nn.Parameter  # [H / tp * 2h', h]: the query (and key) of head 0, its value, those of head 1, ...
    proj_weight: torch.nn.Parameter  # [h, H / tp * h']
    centroids: Tensor  # fp32 [H / tp, rho, h'], unit vectors
    cluster_sums: Tensor  # fp32 [H / tp, rho, h' + 1]: sum and number of each centroid's tokens since the last update

    def __init__(self, config: MosaTransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config, tp_group)
        heads, size, width = config.num_routing_heads, config.head_dim, config.hidden_size
        init, output_init = cast(Any, config.init_method), cast(Any, config.output_layer_init_method)  # never None
        self.clusters = config.mosa_routing_clusters
        self.add_weight("qv_weight", (heads * 2 * size, width), 0, init)
        self.add_weight("proj_weight", (width, heads * size), 1, output_init)
        self.add_state("centroids", (heads, self.clusters, size), random_directions)
        self.add_state("cluster_sums", (heads, self.clusters, size + 1))

    def forward(self, hidden_states: Tensor, documents: AnyDocuments | None = None) -> Tensor:
        """Compute this rank's part of the sum over heads: [T, B, h] from [T, B, h]."""
        kernels = get_backend(self.config.mosa_backend, hidden_states, self.config.head_dim)
        return self.attend(hidden_states, documents, kernels, self.training and not is_repetition())[0]

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
        output, indices = self.attend(hidden_states, documents, kernels, True, selected)
        return Contribution(output if addend is None else addend + output, hidden_states, indices)

    def is_causal(self, training: bool) -> bool:
        return False

    def attend(
        self,
        hidden_states: Tensor,
        documents: AnyDocuments | None,
        kernels: KernelBackend,
        counts: bool,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the forward pass as a function of its arguments.

        Args:
            hidden_states: [T, B, h].
            documents: the documents of the batch, within which tokens attend; clusters are of the whole sequence.
            kernels: the backend that selects tokens.
            counts: whether the tokens are added to ``cluster_sums``.
            indices: the clusters of an earlier call with the same states, which is not counted again; None: find them.

        Returns:
            The output [T, B, h], and the tokens of each cluster, int64 [B, H / tp * rho, k] in position order.
        """
        length, batch, _ = hidden_states.shape
        config, size = self.config, self.config.head_dim
        states = F.linear(hidden_states, self.qv_weight).view(length, batch, -1, 2, size)
        query, value = states.permute(3, 1, 2, 0, 4).unbind(0)  # [B, H, T, h']
        directions = F.normalize(query.to(accumulation_dtype(query.dtype)), dim=-1)
        if indices is None:
            indices = self._cluster(directions.detach(), kernels, counts)
        positions = torch.arange(length, device=query.device)
        if documents is not None and config.mosa_restart_rotary:
            positions = (positions - documents.starts).unsqueeze(1)  # [B, 1, T]
        # Of length sqrt(h'), as by the paper's layer norm without parameters.
        query = naive.apply_rotary(
            directions * size**0.5, positions, config.mosa_rotary_percent, config.mosa_rotary_base
        )
        heads = query.shape[1]
        sequences = torch.arange(batch * heads, device=query.device).view(batch, heads, 1, 1)
        rows = (sequences * length + indices.view(batch, heads, self.clusters, -1)).flatten()  # in [B * H * T]
        query, value = (
            part.to(value.dtype).reshape(-1, size)[rows].view(*indices.shape, size) for part in (query, value)
        )  # [B, H * rho, k, h']
        attended = self._attended(query, value, indices, documents)
        return F.linear(self._means(attended, rows, batch, length), self.proj_weight), indices

    @torch.no_grad()
    def _cluster(self, directions: Tensor, kernels: KernelBackend, counts: bool) -> Tensor:
        """Return the tokens nearest to each centroid, int64 [B, H * rho, k], from unit vectors [B, H, T, h']."""
        nearness = _nearness(directions, self.centroids)
        if counts:
            self.cluster_sums.add_(_sums(directions, nearness))
        number = num_selected_tokens(directions.shape[2], self.clusters)
        return kernels.select_tokens(nearness.flatten(1, 2), number)

    def _attended(self, query: Tensor, value: Tensor, indices: Tensor, documents: AnyDocuments | None) -> Tensor:
        """Compute causal attention within clusters [B, H * rho, k, h'], and within documents."""
        if documents is None:
            return F.scaled_dot_product_attention(query, query, value, is_causal=True)
        starts = documents.starts.unsqueeze(1).expand(-1, indices.shape[1], -1).gather(2, indices)  # [B, H * rho, k]
        visible = (indices.unsqueeze(3) >= indices.unsqueeze(2)) & (indices.unsqueeze(2) >= starts.unsqueeze(3))
        return F.scaled_dot_product_attention(query, query, value, visible)

    def _means(self, attended: Tensor, rows: Tensor, batch: int, length: int) -> Tensor:
        """Return each token's mean over clusters, [T, B, H * h'], of [B, H * rho, k, h'] at ``rows`` in [B * H * T]."""
        size, heads = attended.shape[3], attended.shape[1] // self.clusters
        dtype = accumulation_dtype(attended.dtype)
        total = torch.zeros(batch * heads * length, size, dtype=dtype, device=attended.device)
        total = total.index_add(0, rows, attended.reshape(-1, size).to(dtype))
        number = torch.zeros(len(total), dtype=dtype, device=attended.device)
        number = number.index_add(0, rows, torch.ones_like(rows, dtype=dtype))
        means = (total / number.clamp(min=1).unsqueeze(1)).to(attended.dtype)
        return means.view(batch, heads, length, size).permute(2, 0, 1, 3).flatten(2)

    def update(self, sums: Tensor) -> None:
        """Move each centroid towards the mean of its tokens, by sum and number [H / tp, rho, h' + 1] over all ranks."""
        total, number = sums[..., :-1], sums[..., -1:]
        decay = self.config.mosa_routing_decay
        moved = decay * self.centroids + (1 - decay) * total / number.clamp(min=1)
        self.centroids.copy_(torch.where(number > 0, F.normalize(moved, dim=-1), self.centroids))
        self.cluster_sums.zero_()


@without_autocast
def _nearness(directions: Tensor, centroids: Tensor) -> Tensor:
    """Return numbers [B, H, rho, T] that fall with the distance of unit vectors, [B, H, T, h'] and [H, rho, h'].

    They are from 0 to 2, because kernels select by numbers of at least 0.
    """
    return (1 + torch.einsum("bhtd,hcd->bhct", directions, centroids.to(directions.dtype))).clamp(min=0)


@without_autocast
def _sums(directions: Tensor, nearness: Tensor) -> Tensor:
    """Return sum and number of the tokens to which each centroid is the nearest, fp32 [H, rho, h' + 1]."""
    nearest = nearness.argmax(dim=2, keepdim=True)  # [B, H, 1, T]
    taken = nearest == torch.arange(nearness.shape[2], device=nearest.device)[:, None]  # [B, H, rho, T]
    summands = F.pad(directions.float(), (0, 1), value=1.0)  # [B, H, T, h' + 1]
    return torch.einsum("bhct,bhtd->hcd", taken.float(), summands)


def random_directions(tensor: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill a tensor [..., h'] with unit vectors in random directions."""
    tensor.normal_(generator=generator)
    tensor.div_(tensor.norm(dim=-1, keepdim=True))
