"""How many heads of a member's kind the budget holds: the cost of the member that all others are relative to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_mosa.config import Config
from megatron_mosa.errors import UserError
from megatron_mosa.model import model_flops, paper_flops
from megatron_mosa.tools.grid.grid import Member
from megatron_mosa.tools.grid.kinds import MemberKind
from megatron_mosa.tools.scaling.isoflop import most_dense_heads, most_heads

_CLOSE = 0.02  # of the budget, as near as measured times need to come
_MOST_MEASUREMENTS = 6  # of a model's step, in search of a number of heads


@dataclass(frozen=True)
class Cost:
    """What members of a grid have in common."""

    equal: str
    """One of ``grid.EQUAL``."""

    of: Callable[[Config], float]
    """FLOPs of a sequence, or seconds of a step."""

    def text(self, cost: float) -> str:
        """Return a cost with its unit."""
        return f"{1000 * cost:.1f} ms" if self.equal == "step_time" else f"{cost / 1e9:.4g} GFLOP"


def flops_cost(equal: str, vocab_size: int) -> Cost:
    """Return the cost in FLOPs: "paper_flops" of a forward pass, or "executed_flops" of a step."""
    return Cost(equal, paper_flops if equal == "paper_flops" else lambda config: model_flops(config, vocab_size))


def with_count(config: Config, key: str, number: int) -> Config:
    """Return the configuration with another value of a key, unchecked."""
    section, name = key.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: number})})


def solve_heads(config: Config, kind: MemberKind, member: Member, cost: Cost, budget: float) -> int:
    """Return the largest number of heads of a kind with which a model costs no more than the budget.

    The number is a multiple of the tensor-parallel size. If the cost is a measured time, it is the number whose time
    comes closest to the budget, among few that are tried.

    Args:
        config: of the member; its number of heads of this kind does not matter.
        member: for what would fit, in the error.

    Raises:
        UserError: not one head fits.
    """
    step = config.parallel.tensor_model_parallel_size

    def price(number: int) -> float:
        return cost.of(with_count(config, kind.counts, number))

    if cost.equal == "step_time":
        start = most_heads(lambda n: paper_flops(with_count(config, kind.counts, n)), paper_flops(config), step=step)
        heads = _closest(price, budget, max(start, step), step)
    else:
        ripple = math.ceil(config.mosa.sparsity) if kind.has_ripples else 0
        heads = most_heads(price, budget, step=step, ripple=ripple)
    if not heads:
        raise UserError(_does_not_fit(config, kind, member, cost, budget))
    return heads


def _closest(seconds: Callable[[int], float], budget: float, start: int, step: int) -> int:
    """Return the number of heads whose measured time is closest to the budget, by interpolation; 0: one is too many."""
    times = {number: seconds(number) for number in (start, start // (2 * step) * step or 2 * start)}
    while len(times) < _MOST_MEASUREMENTS:
        nearest = min(times, key=lambda number: abs(times[number] - budget))
        if abs(times[nearest] / budget - 1) <= _CLOSE:
            return nearest
        (few, fast), (many, slow) = sorted(times.items(), key=lambda item: abs(item[1] - budget))[:2]
        slope = (slow - fast) / (many - few)
        if slope <= 0:  # noise, or time that does not depend on the heads
            break
        number = max(step, round((few + (budget - fast) / slope) / step) * step)
        if number in times:
            break
        times[number] = seconds(number)
    most = (1 + _CLOSE) * budget
    if min(times.values()) > most:
        times.setdefault(step, seconds(step))
    return 0 if min(times.values()) > most else min(times, key=lambda number: abs(times[number] - budget))


def _does_not_fit(config: Config, kind: MemberKind, member: Member, cost: Cost, budget: float) -> str:
    """Return the error message for a budget without room for a head, with what would fit."""
    step = config.parallel.tensor_model_parallel_size
    heads = "one head" if step == 1 else f"{step} heads (parallel.tensor_model_parallel_size)"
    one = with_count(config, kind.counts, step)
    fix = "raise the budget: more dense heads in the model that it is relative to"
    if cost.equal != "step_time":
        most = most_dense_heads(one, cost.of, budget)
        fix = f"set a greater sparsity, or {fix}" if most is None else f"set dense_heads to at most {most}"
    return (
        f"the budget of {cost.text(budget)} ({cost.equal}) holds no {member.kind} head of sparsity "
        f"{config.mosa.sparsity:g} beside {member.dense_heads} dense ones: with {heads} the model costs "
        f"{cost.text(cost.of(one))}; {fix}"
    )
