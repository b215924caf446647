"""Bounds of the numbers on the command line, and options of sbatch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from inspect import Parameter, signature
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from megatron_mosa.cli import COMMANDS, Command, Group
from megatron_mosa.errors import UserError
from megatron_mosa.options import bounds
from megatron_mosa.sbatch import check_sbatch_option, sbatch_options

ELSEWHERE = {
    "generate": "tools.decoding.sampling, before anything is loaded",
    "pretrain": "commands.training, for pretrain_mosa.py too",
}
"""Commands that check their numbers themselves, and where."""


def numbers(command: Group | Command, name: str) -> Iterator[Any]:
    """Yield a case for each argument of a command that is a number: its types, what Typer knows of it, its default."""
    if isinstance(command, Group):
        for child, below in [*command.commands.items(), ("", command.default)]:
            if below is not None:
                yield from numbers(below, f"{name} {child}".strip())
        return
    for key, hint in get_type_hints(command, include_extras=True).items():
        inner = get_args(hint)[:1]  # int | None in Annotated[int | None, ...]
        types = {int, float} & {*inner, *(kind for one in inner for kind in get_args(one))}
        if types and not (info := hint.__metadata__[0]).hidden and name not in ELSEWHERE:
            yield pytest.param(types, info, signature(command).parameters[key].default, id=f"{name} {key}")


NUMBERS = list(numbers(COMMANDS, ""))


@pytest.mark.parametrize(("types", "info", "default"), NUMBERS)
def test_every_number_has_bounds(types: set[type], info: Any, default: Any) -> None:
    """NaN passes all comparisons, and no computer steps 10^20 times."""
    assert info.callback is not None
    param = SimpleNamespace(opts=info.param_decls or ["number"], metavar=info.metavar)
    for value in (-1, 10**20, *((math.nan, math.inf) if float in types else ())):
        with pytest.raises(
            UserError, match=rf"^({param.opts[0]}|{param.metavar}) must be .* and at most .*, got {value}$"
        ):
            info.callback(param, value)
    if default is not Parameter.empty:
        assert info.callback(param, default) == default


def test_bounds_are_included() -> None:
    param: Any = SimpleNamespace(opts=["-s", "--steps"])
    for value in (1, 5, None):
        assert bounds(1, 5)(param, value) == value
    for value in (0, 6, math.nan):
        with pytest.raises(UserError, match=f"^--steps must be at least 1 and at most 5, got {value}$"):
            bounds(1, 5)(param, value)
    with pytest.raises(UserError, match="^--steps must be greater than 0 and at most 5, got 0$"):
        bounds(above=0, most=5)(param, 0)


def test_numbers_are_found() -> None:
    assert len(NUMBERS) > 25


def test_options_of_sbatch_for_all_commands() -> None:
    found = sbatch_options(True, 4, "gpu", None, ["--mem=0", "--comment=two words"])
    assert found == ["--partition=gpu", "--mem=0", "--comment=two words"]
    for options, words in {
        (False, 4, None, None): "need --slurm",
        (False, None, "gpu", None): "need --slurm",
        (True, None, None, None): "--slurm needs --gpus-per-node",
        (True, 1, "a b", None): "--partition must be",
        (True, 1, None, "x;id"): "--account must be",
    }.items():
        with pytest.raises(UserError, match=words):
            sbatch_options(*options, None)
    for option, words in {
        "mem=0": "is not an option of sbatch",
        "--comment=a\nid": "is not an option of sbatch",
        "--nodes=7": "follows from the number of processes",
        "-N7": "follows from the number of processes",
        "--gpus-per-node=2": "use --gpus-per-node",
        "--wrap=id": "leave it out",
        "--time=soon": "--time must be",
    }.items():
        with pytest.raises(UserError, match=words):
            sbatch_options(True, 1, None, None, [option])
    with pytest.raises(UserError, match="not read it as one option"):
        check_sbatch_option("--comment=two words", {}, is_line=True)
