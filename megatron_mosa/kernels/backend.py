"""The interface of a kernel backend."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_mosa.kernels.documents import Documents


class KernelBackend(Protocol):
    """An implementation of MoSA heads and of what else a step needs kernels for: the module ``naive`` or ``triton``.

    ``naive`` is the reference: it documents arguments, shapes and results of each function.
    """

    @property
    def NAME(self) -> str: ...

    def router_scores(self, hidden_states: Tensor, /, router_weight: Tensor) -> Tensor: ...

    def select_tokens(
        self,
        scores: Tensor,
        num_selected: int,
        include_first_token: bool = False,
        document_starts: Tensor | None = None,
        quotas: Tensor | None = None,
    ) -> Tensor: ...

    def select_above(
        self,
        scores: Tensor,
        thresholds: Tensor,
        capacity: int,
        document_starts: Tensor | None = None,
        feedback: float = 0.0,
        share: float = 0.0,
    ) -> Tensor: ...

    def count_above(
        self,
        scores: Tensor,
        thresholds: Tensor,
        document_starts: Tensor | None = None,
        feedback: float = 0.0,
        share: float = 0.0,
    ) -> Tensor: ...

    def count_scores(self, scores: Tensor, histogram: Tensor) -> None: ...

    def selected_attention(
        self,
        hidden_states: Tensor,
        /,
        router_weight: Tensor,
        scores: Tensor,
        indices: Tensor,
        qkv_weight: Tensor,
        proj_weight: Tensor,
        *,
        rotary_percent: float,
        rotary_base: float,
        document_starts: Tensor | None = None,
        restart_rotary: bool = False,
        slots: Documents | None = None,
        is_full: bool = False,
        addend: Tensor | None = None,
    ) -> Tensor: ...

    def split_heads(
        self,
        qkv: Tensor,
        rotary_percent: float,
        rotary_base: float,
        document_starts: Tensor | None = None,
        stride: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def swiglu(self, gate_up: Tensor) -> Tensor: ...

    def accumulate(self, total: Tensor, gradient: Tensor, replaces: Tensor) -> None: ...

    def linear_cross_entropy(
        self, hidden_states: Tensor, /, weight: Tensor, targets: Tensor, token_weights: Tensor
    ) -> Tensor: ...
