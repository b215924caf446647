"""The commands ``mosa config``: show, compare and list configurations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.commands.arguments import Overrides
from megatron_mosa.config import (
    REFERENCE_FILE,
    difference,
    load_config,
    origins,
    read_yaml,
    reference,
    resolved,
    summary,
)
from megatron_mosa.errors import UserError
from megatron_mosa.utils import file_problem


def show(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file. Omit it to print all keys with their meaning.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print a resolved configuration with the origin of each value, or the annotated reference of all keys."""
    if config is None:
        print(reference(), end="")
    else:
        print(resolved(load_config(config, overrides or []), origins(config, overrides or [])), end="")


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="YAML file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="YAML file.")],
) -> None:
    """Print the keys whose values differ between two configurations."""
    rows = list(difference(load_config(first), load_config(second)))
    if not rows:
        print(f"{first} and {second} hold the same configuration")
        return
    rows.insert(0, ("key", str(first), str(second)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for key, ours, theirs in rows:
        print(f"{key:{widths[0]}}  {ours:{widths[1]}}  {theirs}")


def list_configurations(
    folder: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="The directory to search.")] = Path("configs"),
) -> None:
    """List the configurations in a directory with a summary of each model, and the grids with their members."""
    if not folder.is_dir():
        raise UserError(
            f"'{folder}' is not a directory; give one that contains YAML files, such as the project's configs/"
        )
    found = {str(path): path for path in _yaml_files(folder) if path.name != REFERENCE_FILE}
    if not found:
        raise UserError(
            f"'{folder}' contains no YAML files; give a directory that does, such as the project's configs/"
        )
    width = max(map(len, found))
    for name, path in found.items():
        print(f"{name:{width}}  {_summary(path)}")


def _yaml_files(folder: Path) -> list[Path]:
    """Return the YAML files below a folder. Links are followed, but each folder is read once, so that loops end."""
    found, seen = list[Path](), set[str]()
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            subfolders.clear()  # in place, because os.walk descends into what remains in it
            continue
        seen.add(real)
        subfolders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))  # links last
        found += [Path(parent, name) for name in names if name.endswith((".yaml", ".yml"))]
    return sorted(found)


def _summary(path: Path) -> str:
    """Return one line on a configuration, on a grid, which names configurations and is none, or on what is wrong."""
    try:
        members = read_yaml(path).get("members")
        if isinstance(members, dict):
            return f"grid of {', '.join(map(str, members))}: mosa isoflop run {path}"
        return summary(load_config(path))
    except UserError as error:
        return f"cannot be used: {error}"
    except OSError as error:
        return f"cannot be used: {file_problem(error)}"
