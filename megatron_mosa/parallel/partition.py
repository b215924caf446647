"""How a parameter is split over the tensor-parallel group: described once, used by initialisation and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """Split along ``dim``; with ``stride`` s the whole is s blocks one after the other, each of them split.

    Stride 2 is the first matrix of a gated MLP: gate above up, and every rank holds a part of each.
    """

    dim: int
    stride: int = 1

    def part_of(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """One rank's part of the whole tensor."""
        blocks = self.unfold(whole)
        return self.fold(blocks.chunk(size, dim=self.unfolded_dim)[rank])

    def unfold(self, tensor: Tensor) -> Tensor:
        """A view of a part, or of the whole, in which a part is a contiguous range of the whole.

        [..., s * n, ...] becomes [..., s, n, ...] with the blocks apart.
        """
        return tensor.unflatten(self.dim, (self.stride, -1))

    def fold(self, unfolded: Tensor) -> Tensor:
        """The inverse of ``unfold``: the blocks one after the other."""
        return unfolded.flatten(self.dim, self.unfolded_dim)

    @property
    def unfolded_dim(self) -> int:
        """The split dimension of an unfolded tensor."""
        return self.dim + 1


def partition_of(parameter: Tensor) -> Partition | None:
    """How a parameter is split, by the attributes that Megatron-core and DeepSpeed use; None: it is replicated."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return Partition(getattr(parameter, "partition_dim"), getattr(parameter, "partition_stride", 1))  # noqa: B009
