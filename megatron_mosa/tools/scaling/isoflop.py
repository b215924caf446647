"""How many MoSA heads a budget buys: the IsoFLOP rule of the paper (sections 2 and 4).

The budget is the forward FLOPs of a dense baseline, by the paper's formulas. The model to compare with it differs only
in its heads: a given number of dense heads (4 in the paper's hybrids, 0 for pure MoSA), and the largest number of MoSA
heads with which the whole model costs no more than the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_mosa.attention import num_selected_tokens
from megatron_mosa.config import Config
from megatron_mosa.errors import UserError
from megatron_mosa.model import dense_head_flops, mosa_head_flops, paper_flops, parameter_count


@dataclass(frozen=True)
class IsoflopModel:
    """The model with the most MoSA heads that fit the budget of a dense baseline."""

    config: Config  # the baseline's, with other head counts and another sparsity
    num_selected: int  # k, tokens per MoSA head
    flops: int  # forward pass of one sequence, by the paper's formulas
    baseline_flops: int
    parameters: int  # with a vocabulary of data.vocab_size tokens

    @property
    def num_mosa_heads(self) -> int:
        """Number of MoSA heads per layer."""
        return self.config.mosa.num_heads

    @property
    def share(self) -> float:
        """FLOPs as a share of the baseline's, at most 1."""
        return self.flops / self.baseline_flops


def solve_isoflop(baseline: Config, sparsity: float, num_dense_heads: int = 4) -> IsoflopModel:
    """Find the largest number of MoSA heads whose model costs no more than ``baseline`` (paper, section 4).

    Args:
        baseline: a dense model; its FLOPs are the budget.
        sparsity: rho of the MoSA heads.
        num_dense_heads: dense heads to keep next to them; 0 for pure MoSA.

    Raises:
        UserError: the baseline has MoSA heads, a number is out of range, or not even one MoSA head fits.
    """
    _check(baseline, sparsity, num_dense_heads)
    model, length = baseline.model, baseline.data.sequence_length
    budget = paper_flops(baseline)
    selected = num_selected_tokens(length, sparsity)
    price = model.num_layers * mosa_head_flops(model.hidden_size, model.head_dim, length, selected)
    left = budget - paper_flops(_with_heads(baseline, num_dense_heads, 0, sparsity))
    if left < price:
        raise UserError(_does_not_fit(baseline, sparsity, num_dense_heads, left, price))
    heads = most_heads(lambda number: paper_flops(_with_heads(baseline, num_dense_heads, number, sparsity)), budget)
    config = _with_heads(baseline, num_dense_heads, heads, sparsity)
    return IsoflopModel(
        config=config,
        num_selected=selected,
        flops=paper_flops(config),
        baseline_flops=budget,
        parameters=parameter_count(config, config.data.vocab_size),
    )


def most_heads(cost: Callable[[int], float], budget: float, *, step: int = 1, ripple: int = 0) -> int:
    """Return the largest number of heads, a multiple of ``step``, whose cost is within the budget; 0 if there is none.

    Args:
        cost: of a model with so many heads, 1 or more; from ``ripple`` heads to the next as many it rises.
        ripple: how many heads may in between cost less than fewer of them: with token choice, where the heads of a
            token are a rounded share of all, rho of them.
    """
    period = max(1, -(-ripple // step))  # in steps
    fits = lambda number: cost(number * step) <= budget  # noqa: E731
    high = period
    while fits(high):
        high *= 2
    low = high // 2 if high > period else 0
    while high - low > period:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return step * next((number for number in range(high + 3 * period, 0, -1) if fits(number)), 0)


def _with_heads(config: Config, dense: int, mosa: int, sparsity: float) -> Config:
    return replace(
        config,
        model=replace(config.model, num_dense_heads=dense),
        mosa=replace(config.mosa, num_heads=mosa, sparsity=sparsity),
    )


def _check(baseline: Config, sparsity: float, num_dense_heads: int) -> None:
    if baseline.mosa.num_heads:
        raise UserError(
            f"mosa.num_heads must be 0, got {baseline.mosa.num_heads}: the budget is that of a dense baseline; give a "
            "dense configuration, such as configs/paper/tiny.yaml"
        )
    if not math.isfinite(sparsity) or sparsity < 1:
        raise UserError(f"sparsity must be at least 1 (every token), got {sparsity:g}")
    if num_dense_heads < 0:
        raise UserError(f"the number of dense heads must be at least 0 (pure MoSA), got {num_dense_heads}")


def _does_not_fit(baseline: Config, sparsity: float, num_dense_heads: int, left: int, price: int) -> str:
    """Return the error message for a budget too small for one MoSA head, with what would fit."""
    model = baseline.model
    dense = model.num_layers * dense_head_flops(model.hidden_size, model.head_dim, baseline.data.sequence_length)
    most = model.num_dense_heads - -(-price // dense)  # dense heads that leave room for one MoSA head
    fix = f"use 0 to {most} dense heads" if most >= 0 else "use a greater sparsity or a longer sequence"
    remains = f"{left / 1e9:.4g} GFLOP" if left > 0 else "nothing"
    return (
        f"no MoSA head of sparsity {sparsity:g} fits next to {num_dense_heads} dense heads in the budget of "
        f"model.num_dense_heads={model.num_dense_heads}: {remains} is left, one costs {price / 1e9:.4g} GFLOP; {fix}"
    )
