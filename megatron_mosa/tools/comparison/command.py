"""The command ``mosa compare``: runs side by side, as a table and a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.entry import check_output
from megatron_mosa.errors import UserError
from megatron_mosa.utils import table_console


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, such as runs/quickstart.")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE.png", help="Where the picture is written.")] = Path(
        "comparison.png"
    ),
) -> None:
    """Compare runs: a table, and a picture of their losses over steps, tokens and seconds."""
    paths = [Path(os.path.realpath(run)) for run in runs]
    if len(set(paths)) < len(runs):
        raise UserError("compare takes each run once; name different run directories")
    check_output("--output", output, suffix=".png")
    from megatron_mosa.tools.comparison.curves import plot, read_run, table

    found = [replace(read_run(run), name=name) for run, name in zip(runs, _names(paths), strict=True)]
    table_console().print(table(found))
    output.parent.mkdir(parents=True, exist_ok=True)
    plot(found, output)
    print(f"Wrote {output}")


def _names(paths: Sequence[Path]) -> list[str]:
    """Return as many of the last parts of different paths as tell them apart."""
    for number in count(1):
        names = ["/".join(path.parts[-number:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
