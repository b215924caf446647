"""The ``mosa`` command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa import __version__
from megatron_mosa.config import load_config, origins
from megatron_mosa.config.render import REFERENCE_FILE, difference, reference, resolved, summary
from megatron_mosa.decode.commands import cache_report, generate
from megatron_mosa.entry import keep_freed_memory, raise_gc_threshold, run
from megatron_mosa.errors import UserError
from megatron_mosa.evaluation.commands import evaluate
from megatron_mosa.resilience.doctor import doctor
from megatron_mosa.resilience.status_view import status
from megatron_mosa.scaling.commands import isoflop, sweep
from megatron_mosa.slurm.commands import submit
from megatron_mosa.tools.bench.commands import bench

app = typer.Typer(help="Data, checkpoints, jobs and evaluation of MoSA language models.", no_args_is_help=True)
data_app = typer.Typer(help="Build, verify and inspect datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
config_app = typer.Typer(help="Show, compare and list configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")
checkpoint_app = typer.Typer(no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")
app.command("bench")(bench)
app.command("isoflop")(isoflop)
app.command("sweep")(sweep)
app.command("evaluate")(evaluate)
app.command("generate")(generate)
app.command("cache-report")(cache_report)
app.command("status")(status)
app.command("doctor")(doctor)
app.command("submit")(submit)

CheckpointPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run directory or its checkpoints/ (the newest one).")
]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; it must not exist.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing model at OUT.")]
ConfigPath = Annotated[Path, typer.Argument(help="YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="values that override the file's")
]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Data, checkpoints, jobs and evaluation of MoSA language models."""
    if show:
        print(__version__)
        raise typer.Exit


@config_app.command("show")
def config_show(
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


@config_app.command("diff")
def config_diff(
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


@config_app.command("list")
def config_list(
    folder: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="The directory to search.")] = Path("configs"),
) -> None:
    """List the configurations in a directory with a summary of each model."""
    if not folder.is_dir():
        raise UserError(
            f"'{folder}' is not a directory; give one that contains YAML files, such as the project's configs/"
        )
    rows = {str(path): path for path in sorted(folder.rglob("*.yaml")) if path.name != REFERENCE_FILE}
    if not rows:
        raise UserError(
            f"'{folder}' contains no YAML files; give a directory that does, such as the project's configs/"
        )
    for name, path in rows.items():
        print(f"{name:{max(map(len, rows))}}  {summary(load_config(path))}")


@data_app.command("build")
def data_build(
    config: ConfigPath,
    overrides: Overrides = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing dataset or the remains of an earlier build.")
    ] = False,
) -> None:
    """Tokenise the sources in section `data` into a Megatron dataset (.bin/.idx) with a manifest."""
    settings = load_config(config, overrides or [])
    from megatron_mosa.data import build_dataset  # slow to import

    build_dataset(settings.data, force=force)


@data_app.command("index")
def data_index(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build the shuffled sample orders of a run in advance, so that training does not write them."""
    settings = load_config(config, overrides or [])
    from megatron_mosa.train.start import build_index

    for folder in build_index(settings):
        print(folder)


Dataset = Annotated[
    Path, typer.Argument(metavar="PATH", help="A dataset, or a YAML file whose `data` section names one.")
]


@data_app.command("verify")
def data_verify(path: Dataset, overrides: Overrides = None) -> None:
    """Verify all files of a dataset against the hashes in its manifest; exit with 1 if one is damaged or missing."""
    from megatron_mosa.data.commands import dataset_folders, verify

    for folder in dataset_folders(path, overrides or []):
        verify(folder)


@data_app.command("inspect")
def data_inspect(path: Dataset, overrides: Overrides = None) -> None:
    """Print the documents, tokens, splits, tokenizer, sources and sizes of a dataset."""
    from megatron_mosa.data.commands import dataset_folders, inspect

    for folder in dataset_folders(path, overrides or []):
        inspect(folder)


@data_app.command("sample")
def data_sample(
    config: ConfigPath,
    number: Annotated[int, typer.Argument(metavar="N", help="Position in the data order, from 0.")],
    overrides: Overrides = None,
) -> None:
    """Print sample N as training sees it: decoded text, with a line at the end of each document."""
    settings = load_config(config, overrides or [])
    from megatron_mosa.train.sample import sample_text

    print(sample_text(settings, number))


@checkpoint_app.callback()
def checkpoint() -> None:
    """Inspect and convert checkpoints, in one process without a GPU."""
    keep_freed_memory()


@checkpoint_app.command("inspect")
def checkpoint_inspect(
    path: CheckpointPath,
    full: Annotated[bool, typer.Option("--full", help="Verify the hashes of all files, not just their sizes.")] = False,
) -> None:
    """Describe a checkpoint (ours or another program's) or an exported model, and check that it is intact."""
    from megatron_mosa.checkpoint.inspect import inspect  # slow to import, like those below

    inspect(path, full=full)


@checkpoint_app.command("export")
def checkpoint_export(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A checkpoint or run directory (the newest one); fp32: also DeepSpeed's."),
    ],
    target: Target,
    to: Annotated[str, typer.Option("--to", metavar="hf|fp32|torch-dist", help="The format to write.")],
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="float32|bfloat16", help="hf: dtype of the weights.")
    ] = "float32",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", metavar="PATH", help="hf: tokenizer.json or its directory; default: the dataset's."
        ),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="hf: skip comparing logits with the Megatron model (prints a notice).")
    ] = False,
    force: Force = False,
) -> None:
    """Export a checkpoint to the format of another program.

    hf: a directory that transformers loads without this project; its logits are compared with the Megatron model's.
    fp32: one fp32 state dict as safetensors, also from DeepSpeed's ZeRO shards.
    torch-dist: a checkpoint that Megatron-LM loads; only for models whose heads are all dense.
    """
    if to in ("fp32", "torch-dist") and (dtype, tokenizer, no_check) != ("float32", None, False):
        raise UserError(
            f"--dtype, --tokenizer and --no-check apply only to --to hf; --to {to} always writes fp32 weights"
        )
    from megatron_mosa.checkpoint.hf_export import export_hf
    from megatron_mosa.checkpoint.state_dict_export import export_state_dict
    from megatron_mosa.checkpoint.torch_dist_export import export_torch_dist

    if to == "hf":
        export_hf(path, target, dtype=dtype, tokenizer=tokenizer, checks_logits=not no_check, force=force)
    elif to == "fp32":
        export_state_dict(path, target, force=force)
    elif to == "torch-dist":
        export_torch_dist(path, target, force=force)
    else:
        raise UserError(f"--to must be hf, fp32 or torch-dist, got {to}")


@checkpoint_app.command("import")
def checkpoint_import(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="hf, torch-dist: a directory; mosa-pytorch: a layer's file.")
    ],
    target: Target,
    source: Annotated[str, typer.Option("--from", metavar="hf|torch-dist|mosa-pytorch", help="The format to read.")],
    add_mosa_heads: Annotated[
        int, typer.Option("--add-mosa-heads", min=0, help="New MoSA heads to add to each layer of a model without any.")
    ] = 0,
    sparsity: Annotated[float, typer.Option("--sparsity", help="Sparsity rho of the added heads; k = T / rho.")] = 16.0,
    other_heads: Annotated[
        str, typer.Option("--other-heads", metavar="dense|local", help="mosa-pytorch: the kind of the other heads.")
    ] = "dense",
    prefix: Annotated[
        str, typer.Option("--prefix", help="mosa-pytorch: prefix of the layer's parameters, as in layers.0.attention.")
    ] = "",
    force: Force = False,
) -> None:
    """Import a model as a checkpoint that a run can start from (checkpoint.initialize_from).

    hf: an exported model or a Llama model. torch-dist: a Megatron-LM GPT without experts or biases.

    mosa-pytorch: one attention layer of the authors' PyTorch code, written as a .safetensors file for our layer.
    """
    from megatron_mosa.checkpoint.imported import import_model
    from megatron_mosa.checkpoint.locate import Kind
    from megatron_mosa.checkpoint.upstream import import_layer

    kinds = {"hf": Kind.HUGGING_FACE, "torch-dist": Kind.TORCH_DIST}
    if source in kinds:
        import_model(kinds[source], path, target, add_mosa_heads=add_mosa_heads, sparsity=sparsity, force=force)
    elif source == "mosa-pytorch":
        import_layer(path, target, other_heads=other_heads, prefix=prefix, force=force)
    else:
        raise UserError(f"--from must be {', '.join(kinds)} or mosa-pytorch, got {source}")


@checkpoint_app.command("reshard")
def checkpoint_reshard(
    path: CheckpointPath,
    target: Target,
    tensor_parallel: Annotated[
        int | None,
        typer.Option("--tensor-parallel", min=1, help="Tensor-parallel size to write for; default: the current one."),
    ] = None,
    drop_optimizer: Annotated[bool, typer.Option("--drop-optimizer", help="Omit Adam's moments.")] = False,
    force: Force = False,
) -> None:
    """Rewrite a checkpoint for another tensor-parallel size. (Runs resume at any size without this.)"""
    from megatron_mosa.checkpoint.reshard import reshard

    reshard(path, target, tensor_parallel=tensor_parallel, drop_optimizer=drop_optimizer, force=force)


@checkpoint_app.command("causalize")
def checkpoint_causalize(
    path: CheckpointPath,
    target: Target,
    data: Annotated[
        Path | None, typer.Option("--data", help="A built dataset to calibrate on; default: the run's own.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, metavar="N", help="Number of training sequences to use.")
    ] = 256,
    load_feedback: Annotated[
        float,
        typer.Option(
            "--load-feedback",
            min=0.0,
            max=1000.0,
            metavar="F",
            help="mosa.load_feedback of the result: makes thresholds hold each head's load in every sequence.",
        ),
    ] = 0.0,
    force: Force = False,
) -> None:
    """Calibrate thresholds for the MoSA heads of an expert-choice model: same weights, causal selection."""
    from megatron_mosa.checkpoint.causalize import causalize

    causalize(path, target, data=data, samples=samples, load_feedback=load_feedback, force=force)


@checkpoint_app.command("verify")
def checkpoint_verify(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, a run directory or a Hugging Face model.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same kind or not.")],
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", help="Largest difference of a tensor, relative to its norm; 0: bitwise equal."),
    ] = 0.0,
    no_logits: Annotated[bool, typer.Option("--no-logits", help="Compare only the tensors.")] = False,
) -> None:
    """Compare two models tensor by tensor and by their logits on a fixed batch; exit with 1 if they differ."""
    from megatron_mosa.checkpoint.verify import verify

    verify(first, second, tolerance=tolerance, compares_logits=not no_logits)


def main() -> None:
    """Run ``mosa`` and exit with 0 (success), 1 (failure) or 2 (usage error)."""
    raise_gc_threshold()
    sys.exit(run(app))
