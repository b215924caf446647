"""The commands ``mosa data``: build, verify and inspect datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.commands.arguments import ConfigPath, Overrides
from megatron_mosa.config import check_plan, load_config, origins
from megatron_mosa.options import bounds

Dataset = Annotated[
    Path, typer.Argument(metavar="PATH", help="A dataset, or a YAML file whose `data` section names one.")
]


def build(
    config: ConfigPath,
    overrides: Overrides = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing dataset or the remains of an earlier build.")
    ] = False,
) -> None:
    """Tokenize the sources in section `data` into a Megatron dataset (.bin/.idx) with a manifest."""
    settings = load_config(config, overrides or [])
    from megatron_mosa.data import build_dataset  # slow to import, like those below

    build_dataset(settings.data, force=force)


def index(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build the shuffled sample orders of a run in advance, so that training does not write them."""
    settings = load_config(config, overrides or [])
    check_plan(settings, origins(config, overrides or []))
    from megatron_mosa.train import build_index

    for folder in build_index(settings):
        print(folder)


def verify_dataset(path: Dataset, overrides: Overrides = None) -> None:
    """Verify all files of a dataset against the hashes in its manifest; exit with 1 if one is damaged or missing."""
    from megatron_mosa.data.commands import dataset_folders, verify

    for folder in dataset_folders(path, overrides or []):
        verify(folder)


def inspect_dataset(path: Dataset, overrides: Overrides = None) -> None:
    """Print the documents, tokens, splits, tokenizer, sources and sizes of a dataset."""
    from megatron_mosa.data.commands import dataset_folders, inspect

    for folder in dataset_folders(path, overrides or []):
        inspect(folder)


def sample(
    config: ConfigPath,
    number: Annotated[
        int, typer.Argument(metavar="N", callback=bounds(0, 2**63 - 1), help="Position in the data order, from 0.")
    ],
    overrides: Overrides = None,
) -> None:
    """Print sample N as training sees it: decoded text, with a line at the end of each document."""
    settings = load_config(config, overrides or [])
    from megatron_mosa.train import sample_text

    print(sample_text(settings, number))
