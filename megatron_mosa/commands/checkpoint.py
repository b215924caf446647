"""The commands ``mosa checkpoint``: inspect and convert checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.errors import UserError
from megatron_mosa.options import MOST_HEADS, MOST_PROCESSES, MOST_SAMPLES, bounds

_SPARSITY = 16.0
CheckpointPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="A checkpoint, or a run directory or its checkpoints/ (the newest one).")
]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="What to write, a new directory or file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing model at OUT.")]


def inspect_checkpoint(
    path: CheckpointPath,
    full: Annotated[
        bool,
        typer.Option("--full", help="Verify hashes, not just sizes: of all files, or of an exported model's weights."),
    ] = False,
) -> None:
    """Describe a checkpoint (ours or another program's) or an exported model, and check that it is intact."""
    from megatron_mosa.convert.commands.inspect import inspect  # slow to import, like those below

    inspect(path, full=full)


def export_checkpoint(
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
    from megatron_mosa.convert.commands.export_fp32 import export_state_dict
    from megatron_mosa.convert.commands.export_hf import export_hf
    from megatron_mosa.convert.commands.export_torch_dist import export_torch_dist

    if to == "hf":
        export_hf(path, target, dtype=dtype, tokenizer=tokenizer, checks_logits=not no_check, force=force)
    elif to == "fp32":
        export_state_dict(path, target, force=force)
    elif to == "torch-dist":
        export_torch_dist(path, target, force=force)
    else:
        raise UserError(f"--to must be hf, fp32 or torch-dist, got {to}")


def import_checkpoint(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="hf, torch-dist: a directory; mosa-pytorch: a layer's file.")
    ],
    target: Target,
    source: Annotated[str, typer.Option("--from", metavar="hf|torch-dist|mosa-pytorch", help="The format to read.")],
    add_mosa_heads: Annotated[
        int,
        typer.Option(
            "--add-mosa-heads",
            callback=bounds(0, MOST_HEADS),
            help="New MoSA heads to add to each layer of a model without any.",
        ),
    ] = 0,
    sparsity: Annotated[
        float,
        typer.Option("--sparsity", callback=bounds(1, 2**24), help="Sparsity rho of the added heads; k = T / rho."),
    ] = _SPARSITY,
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
    from megatron_mosa.convert import Kind, import_layer
    from megatron_mosa.convert.commands.import_model import import_model

    kinds = {"hf": Kind.HUGGING_FACE, "torch-dist": Kind.TORCH_DIST}
    if source in kinds and (other_heads, prefix) != ("dense", ""):
        raise UserError(f"--other-heads and --prefix apply only to --from mosa-pytorch, got --from {source}; omit them")
    if source == "mosa-pytorch" and add_mosa_heads:
        raise UserError("--add-mosa-heads applies only to --from hf and torch-dist, got --from mosa-pytorch; omit it")
    if not add_mosa_heads and sparsity != _SPARSITY:
        raise UserError(
            f"--sparsity={sparsity:g} applies only with --add-mosa-heads; add that option, or omit --sparsity"
        )
    if source in kinds:
        import_model(kinds[source], path, target, add_mosa_heads=add_mosa_heads, sparsity=sparsity, force=force)
    elif source == "mosa-pytorch":
        import_layer(path, target, other_heads=other_heads, prefix=prefix, force=force)
    else:
        raise UserError(f"--from must be {', '.join(kinds)} or mosa-pytorch, got {source}")


def reshard_checkpoint(
    path: CheckpointPath,
    target: Target,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel",
            callback=bounds(1, MOST_PROCESSES),
            help="Tensor-parallel size to write for; default: the current one.",
        ),
    ] = None,
    drop_optimizer: Annotated[bool, typer.Option("--drop-optimizer", help="Omit Adam's moments.")] = False,
    force: Force = False,
) -> None:
    """Rewrite a checkpoint for another tensor-parallel size. (Runs resume at any size without this.)"""
    from megatron_mosa.convert.commands.reshard import reshard

    reshard(path, target, tensor_parallel=tensor_parallel, drop_optimizer=drop_optimizer, force=force)


def causalize_checkpoint(
    path: CheckpointPath,
    target: Target,
    data: Annotated[
        Path | None, typer.Option("--data", help="A built dataset to calibrate on; default: the run's own.")
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples", callback=bounds(1, MOST_SAMPLES), metavar="N", help="Number of training sequences to use."
        ),
    ] = 256,
    load_feedback: Annotated[
        float,
        typer.Option(
            "--load-feedback",
            callback=bounds(0, 1000),
            metavar="F",
            help="mosa.load_feedback of the result: makes thresholds hold each head's load in every sequence.",
        ),
    ] = 0.0,
    force: Force = False,
) -> None:
    """Calibrate thresholds for the MoSA heads of an expert-choice model: same weights, causal selection."""
    from megatron_mosa.convert.commands.causalize import causalize

    causalize(path, target, data=data, samples=samples, load_feedback=load_feedback, force=force)


def verify_checkpoint(
    first: Annotated[
        Path,
        typer.Argument(
            metavar="A", help="A checkpoint, a run directory, or a model of Hugging Face's or Megatron-LM's format."
        ),
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same kind or not.")],
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            callback=bounds(0, 1_000_000),
            help="Largest difference of a tensor, relative to its norm; 0: bitwise equal.",
        ),
    ] = 0.0,
    no_logits: Annotated[bool, typer.Option("--no-logits", help="Compare only the tensors.")] = False,
) -> None:
    """Compare two models tensor by tensor and by their logits on a fixed batch; exit with 1 if they differ."""
    from megatron_mosa.convert.commands.verify import verify

    verify(first, second, tolerance=tolerance, compares_logits=not no_logits)
