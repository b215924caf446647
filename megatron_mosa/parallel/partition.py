"""How a parameter is split over the tensor-parallel group, for both initialization and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """A split along ``dim``; with ``stride`` s the whole consists of s consecutive blocks, each of which is split.

    The first matrix of a gated MLP has stride 2: gate block, then up block, and every rank holds a part of each.
    """

    dim: int
    stride: int = 1

    def part_of(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Return one rank's part of the whole tensor."""
        blocks = self.unfold(whole)
        return self.fold(blocks.chunk(size, dim=self.unfolded_dim)[rank])

    def unfold(self, tensor: Tensor) -> Tensor:
        """Return a view of a part, or of the whole, in which a part is a contiguous range of the whole.

        [..., s * n, ...] becomes [..., s, n, ...], one index per block.
        """
        return tensor.unflatten(self.dim, (self.stride, -1))

    def fold(self, unfolded: Tensor) -> Tensor:
        """Return the inverse of ``unfold``: the blocks concatenated."""
        return unfolded.flatten(self.dim, self.unfolded_dim)

    @property
    def unfolded_dim(self) -> int:
        """The split dimension of an unfolded tensor."""
        return self.dim + 1


def partition_of(parameter: Tensor) -> Partition | None:
    """Return a parameter's split, from attributes that Megatron-core and DeepSpeed use; None if replicated."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return Partition(getattr(parameter, "partition_dim"), getattr(parameter, "partition_stride", 1))  # noqa: B009
