"""How many MoSA heads a budget buys: the IsoFLOP rule of the paper (sections 2 and 4).

The budget is the forward FLOPs of a dense baseline, by the paper's formulas. The model to compare with it differs only
in its heads: a given number of dense heads (4 in the paper's hybrids, 0 for pure MoSA), and the largest number of MoSA
heads, a multiple of the tensor-parallel size, with which the whole model costs no more than the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_mosa.attention import num_selected_tokens
from megatron_mosa.config import Config, check
from megatron_mosa.errors import UserError
from megatron_mosa.model import paper_flops, parameter_count
from megatron_mosa.utils import counted


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
        UserError: the baseline has MoSA heads, a number is out of range, not even one MoSA head fits (with tensor
            parallelism: one for each rank), or the configuration does not allow these heads.
    """
    _check(baseline, sparsity, num_dense_heads)
    budget, step = paper_flops(baseline), baseline.parallel.tensor_model_parallel_size

    def model(heads: int) -> Config:
        return _with_heads(baseline, num_dense_heads, heads, sparsity)

    heads = most_heads(lambda number: paper_flops(model(number)), budget, step=step)
    if not heads:
        raise UserError(_does_not_fit(baseline, model(0), model(step)))
    config = model(heads)
    try:
        check(config)
    except UserError as error:
        raise UserError(
            f"a model with {counted(num_dense_heads, 'dense head')} (--dense-heads) and "
            f"{counted(heads, 'MoSA head')} of sparsity {sparsity:g} cannot be trained: {error}"
        ) from None
    return IsoflopModel(
        config=config,
        num_selected=num_selected_tokens(config.data.sequence_length, sparsity),
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


def most_dense_heads(config: Config, cost: Callable[[Config], float], budget: float) -> int | None:
    """Return the largest number of dense heads, below that of ``config``, with which it would be within the budget.

    Only numbers count that tensor parallelism and grouped queries allow.

    Returns:
        None if none fits the budget.
    """
    model, size = config.model, config.parallel.tensor_model_parallel_size
    groups = model.num_query_groups
    least, unit = (0, size) if groups is None else (groups, math.lcm(groups, size))
    for number in range((model.num_dense_heads - 1) // unit * unit, least - 1, -unit):
        if cost(replace(config, model=replace(model, num_dense_heads=number))) <= budget:
            return number
    return None


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


def _does_not_fit(baseline: Config, without: Config, fewest: Config) -> str:
    """Return the error message for a budget too small for MoSA heads, with what would fit.

    Args:
        without: the model without MoSA heads.
        fewest: the same with as few MoSA heads as it can have.
    """
    budget, spent, heads = paper_flops(baseline), paper_flops(without), fewest.mosa.num_heads
    price = paper_flops(fewest) - spent
    most = most_dense_heads(fewest, paper_flops, budget)
    fix = (
        "use a greater sparsity or a longer sequence" if most is None else f"use at most {counted(most, 'dense head')}"
    )
    remains = f"{(budget - spent) / 1e9:.4g} GFLOP" if budget > spent else "nothing"
    costs = "one costs" if heads == 1 else f"{heads} (parallel.tensor_model_parallel_size) cost"
    return (
        f"no MoSA head of sparsity {fewest.mosa.sparsity:g} fits next to "
        f"{counted(fewest.model.num_dense_heads, 'dense head')} in the budget of "
        f"model.num_dense_heads={baseline.model.num_dense_heads}: {remains} is left, {costs} "
        f"{price / 1e9:.4g} GFLOP; {fix}"
    )
