"""The console command ``mosa``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa import __version__
from megatron_mosa.config import load_config
from megatron_mosa.entry import run
from megatron_mosa.scaling.commands import isoflop, sweep

app = typer.Typer(help="MoSA language models: data, and what surrounds pretraining.", no_args_is_help=True)
data_app = typer.Typer(help="Datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.command("isoflop")(isoflop)
app.command("sweep")(sweep)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="values that replace the file's")
]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """MoSA language models: data, and what surrounds pretraining."""
    if show:
        print(__version__)
        raise typer.Exit


@data_app.command("build")
def data_build(
    config: ConfigPath,
    overrides: Overrides = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is in the way: another dataset, or what is left of a build.")
    ] = False,
) -> None:
    """Tokenise the sources of section `data` into a Megatron dataset (.bin/.idx) with a manifest."""
    settings = load_config(config, overrides or [])
    from megatron_mosa.data import build_dataset  # slow to import

    build_dataset(settings.data, force=force)


@data_app.command("index")
def data_index(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build the shuffled orders of a run ahead of it, so that training writes none."""
    settings = load_config(config, overrides or [])
    from megatron_mosa.train.start import build_index

    for folder in build_index(settings):
        print(folder)


def main() -> None:
    """Run ``mosa``; exit codes: 0 done, 1 failed, 2 wrong use."""
    sys.exit(run(app))
