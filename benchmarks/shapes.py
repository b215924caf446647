"""The shapes of the measured layers, and their FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mosa.attention import num_selected_tokens
from megatron_mosa.model import dense_head_flops, mosa_head_flops


@dataclass(frozen=True)
class Shape:
    """One MoSA layer of E heads on B sequences of T tokens of width h; k = T / rho."""

    batch: int
    length: int
    width: int
    head_dim: int
    sparsity: float
    heads: int

    @property
    def selected(self) -> int:
        """Tokens that each head selects, k."""
        return num_selected_tokens(self.length, self.sparsity)

    @property
    def flops(self) -> int:
        """Forward FLOPs by the paper's formula (section 2); backward costs twice that."""
        return self.batch * self.heads * mosa_head_flops(self.width, self.head_dim, self.length, self.selected)

    @property
    def dense_heads(self) -> int:
        """Number of dense heads with the same FLOPs, rounded up."""
        dense = dense_head_flops(self.width, self.head_dim, self.length)
        return -(-self.flops // (self.batch * dense))

    def __str__(self) -> str:
        return (
            f"B{self.batch} T{self.length} h{self.width} h'{self.head_dim} rho{self.sparsity:g} E{self.heads} "
            f"k{self.selected}"
        )


SHAPES = [
    Shape(64, 1024, 512, 64, 16, 142),
    Shape(64, 1024, 1024, 64, 16, 109),
    Shape(64, 1024, 1024, 64, 32, 210),
    Shape(8, 8192, 1024, 64, 64, 1219),
    Shape(16, 4096, 2048, 64, 16, 682),
    Shape(4, 8192, 4096, 128, 32, 1404),
]
