"""The console command ``mosa``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa import __version__
from megatron_mosa.config import load_config, origins
from megatron_mosa.config.render import REFERENCE_FILE, difference, reference, resolved, summary
from megatron_mosa.decode.commands import cache_report, generate
from megatron_mosa.entry import collect_garbage_seldom, keep_freed_memory, run
from megatron_mosa.errors import UserError
from megatron_mosa.evaluation.commands import evaluate
from megatron_mosa.resilience.doctor import doctor
from megatron_mosa.resilience.status_view import status
from megatron_mosa.scaling.commands import isoflop, sweep
from megatron_mosa.slurm.commands import submit

app = typer.Typer(help="MoSA language models: data, and what surrounds pretraining.", no_args_is_help=True)
data_app = typer.Typer(help="Datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
config_app = typer.Typer(help="Configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")
checkpoint_app = typer.Typer(no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")
app.command("isoflop")(isoflop)
app.command("sweep")(sweep)
app.command("evaluate")(evaluate)
app.command("generate")(generate)
app.command("cache-report")(cache_report)
app.command("status")(status)
app.command("doctor")(doctor)
app.command("submit")(submit)

CheckpointPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run directory or its checkpoints/: the newest.")
]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a model that lies at OUT.")]
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


@config_app.command("show")
def config_show(
    config: Annotated[Path | None, typer.Argument(help="YAML file; without one: every key with its meaning.")] = None,
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
    """Print the keys in which two configurations differ."""
    rows = list(difference(load_config(first), load_config(second)))
    if not rows:
        print(f"{first} and {second} are the same configuration")
        return
    rows.insert(0, ("key", str(first), str(second)))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for key, ours, theirs in rows:
        print(f"{key:{widths[0]}}  {ours:{widths[1]}}  {theirs}")


@config_app.command("list")
def config_list(
    folder: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where to look.")] = Path("configs"),
) -> None:
    """List the configurations in a directory, with their models."""
    if not folder.is_dir():
        raise UserError(
            f"'{folder}' is not a directory; give one that holds YAML files, such as the project's configs/"
        )
    rows = {str(path): path for path in sorted(folder.rglob("*.yaml")) if path.name != REFERENCE_FILE}
    if not rows:
        raise UserError(f"'{folder}' holds no YAML files; give a directory that does, such as the project's configs/")
    for name, path in rows.items():
        print(f"{name:{max(map(len, rows))}}  {summary(load_config(path))}")


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


Dataset = Annotated[
    Path, typer.Argument(metavar="PATH", help="A dataset, or a YAML file whose section data names one.")
]


@data_app.command("verify")
def data_verify(path: Dataset, overrides: Overrides = None) -> None:
    """Compare all files of a dataset with the hashes of its manifest; exit code 1 if one is damaged or missing."""
    from megatron_mosa.data.commands import dataset_folders, verify

    for folder in dataset_folders(path, overrides or []):
        verify(folder)


@data_app.command("inspect")
def data_inspect(path: Dataset, overrides: Overrides = None) -> None:
    """Print what a dataset holds: documents, tokens, splits, tokenizer, sources, sizes."""
    from megatron_mosa.data.commands import dataset_folders, inspect

    for folder in dataset_folders(path, overrides or []):
        inspect(folder)


@data_app.command("sample")
def data_sample(
    config: ConfigPath,
    number: Annotated[int, typer.Argument(metavar="N", help="Of the data order, from 0.")],
    overrides: Overrides = None,
) -> None:
    """Print sample N as training sees it: decoded text, with a line at the end of each document."""
    settings = load_config(config, overrides or [])
    from megatron_mosa.train.sample import sample_text

    print(sample_text(settings, number))


@checkpoint_app.callback()
def checkpoint() -> None:
    """Checkpoints: look at them, convert them; one process, no GPU."""
    keep_freed_memory()


@checkpoint_app.command("inspect")
def checkpoint_inspect(
    path: CheckpointPath,
    full: Annotated[bool, typer.Option("--full", help="Compare hashes of all files, not sizes alone.")] = False,
) -> None:
    """Print what a checkpoint of ours or of another program, or an exported model, is and how sound."""
    from megatron_mosa.checkpoint.inspect import inspect  # slow to import, as below

    inspect(path, full=full)


@checkpoint_app.command("export")
def checkpoint_export(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint, a run directory (its newest); fp32: or DeepSpeed's.")
    ],
    target: Target,
    to: Annotated[str, typer.Option("--to", metavar="hf|fp32|torch-dist", help="The format to write.")],
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="float32|bfloat16", help="hf: type of the weights.")
    ] = "float32",
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="PATH", help="hf: tokenizer.json or its folder; default: the dataset's."),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="hf: do not compare logits with the Megatron model; a line says so.")
    ] = False,
    force: Force = False,
) -> None:
    """Write a checkpoint for other programs.

    hf: a folder that transformers loads without this project; its logits are compared with the model's.
    fp32: one state dict as safetensors, also of DeepSpeed's ZeRO shards.
    torch-dist: what Megatron-LM loads, of models with dense heads alone.
    """
    if to in ("fp32", "torch-dist") and (dtype, tokenizer, no_check) != ("float32", None, False):
        raise UserError(f"--dtype, --tokenizer and --no-check belong to --to hf; --to {to} writes fp32 weights alone")
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
        raise UserError(f"--to={to} is not a format; legal: hf, fp32, torch-dist")


@checkpoint_app.command("import")
def checkpoint_import(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="hf, torch-dist: a folder; mosa-pytorch: a layer's.")],
    target: Target,
    source: Annotated[str, typer.Option("--from", metavar="hf|torch-dist|mosa-pytorch", help="The format to read.")],
    add_mosa_heads: Annotated[
        int, typer.Option("--add-mosa-heads", min=0, help="Fresh MoSA heads in each layer of a model without any.")
    ] = 0,
    sparsity: Annotated[float, typer.Option("--sparsity", help="Rho of the added heads; k = T / rho.")] = 16.0,
    other_heads: Annotated[
        str, typer.Option("--other-heads", metavar="dense|local", help="mosa-pytorch: what the other heads are.")
    ] = "dense",
    prefix: Annotated[
        str, typer.Option("--prefix", help="mosa-pytorch: what the layer's names begin with, as in layers.0.attention.")
    ] = "",
    force: Force = False,
) -> None:
    """Write a model as a checkpoint to start from (checkpoint.initialize_from).

    hf: an exported model, or a Llama. torch-dist: a GPT of Megatron-LM's, without experts or biases.

    With --from mosa-pytorch one attention layer of the authors' PyTorch code as a .safetensors file for ours.
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
        raise UserError(f"--from={source} is not a format; legal: {', '.join(kinds)}, mosa-pytorch")


@checkpoint_app.command("reshard")
def checkpoint_reshard(
    path: CheckpointPath,
    target: Target,
    tensor_parallel: Annotated[
        int | None, typer.Option("--tensor-parallel", min=1, help="Size to cut for; default: the one that wrote it.")
    ] = None,
    drop_optimizer: Annotated[bool, typer.Option("--drop-optimizer", help="Leave Adam's moments out.")] = False,
    force: Force = False,
) -> None:
    """Write a checkpoint once more, cut for another tensor-parallel size. (Runs resume at any size without it.)"""
    from megatron_mosa.checkpoint.reshard import reshard

    reshard(path, target, tensor_parallel=tensor_parallel, drop_optimizer=drop_optimizer, force=force)


@checkpoint_app.command("causalize")
def checkpoint_causalize(
    path: CheckpointPath,
    target: Target,
    data: Annotated[
        Path | None, typer.Option("--data", help="A built dataset to calibrate on; default: the run's own.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, metavar="N", help="Training sequences of it.")] = 256,
    load_feedback: Annotated[
        float,
        typer.Option(
            "--load-feedback",
            min=0.0,
            max=1000.0,
            metavar="F",
            help="mosa.load_feedback of the result: thresholds that hold each head's load in every sequence.",
        ),
    ] = 0.0,
    force: Force = False,
) -> None:
    """Give the MoSA heads of an expert-choice model thresholds: the same weights, selecting causally."""
    from megatron_mosa.checkpoint.causalize import causalize

    causalize(path, target, data=data, samples=samples, load_feedback=load_feedback, force=force)


@checkpoint_app.command("verify")
def checkpoint_verify(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint, a run directory or a Hugging Face folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, of the same kind or not.")],
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", help="Largest difference of a tensor, relative to its norm; 0: to the last bit."),
    ] = 0.0,
    no_logits: Annotated[bool, typer.Option("--no-logits", help="Compare tensors alone.")] = False,
) -> None:
    """Compare two models tensor by tensor and by the logits of a fixed batch; exit code 1 if they differ."""
    from megatron_mosa.checkpoint.verify import verify

    verify(first, second, tolerance=tolerance, compares_logits=not no_logits)


def main() -> None:
    """Run ``mosa``; exit codes: 0 done, 1 failed, 2 wrong use."""
    collect_garbage_seldom()
    sys.exit(run(app))
