"""Bounds of the numbers on the command line, and options that several commands have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import typer

from megatron_mosa.errors import UserError

MOST_STEPS = 1_000_000
MOST_SAMPLES = 10_000_000
MOST_HEADS = 65_536
MOST_PROCESSES = 100_000
MOST_MINUTES = 525_600  # a year


def bounds(
    least: float | None = None, most: float | None = None, *, above: float | None = None
) -> Callable[[typer.CallbackParam, Any], Any]:
    """Return a callback for an option that takes numbers from ``least`` or above ``above`` up to ``most``.

    The callback runs while the command line is parsed, before anything slow, and refuses NaN and infinity, too.

    Raises:
        UserError: raised by the callback for any other number.
    """
    assert most is not None and (least is None) != (above is None)
    lower = f"at least {least}" if above is None else f"greater than {above}"

    def check(param: typer.CallbackParam, value: Any) -> Any:
        fits = value is None or (
            math.isfinite(value) and (value > above if above is not None else value >= least) and value <= most
        )
        if not fits:
            shown = f"{value:g}" if isinstance(value, float) else value
            name = max(param.opts, key=len)
            name = name if name.startswith("-") else param.metavar or name
            raise UserError(f"{name} must be {lower} and at most {most}, got {shown}")
        return value

    return check


TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        metavar="MINUTES",
        callback=bounds(above=0, most=MOST_MINUTES),
        help="Stop in order by then; the same command continues later.",
    ),
]
