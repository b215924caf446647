"""Measure how fast a trained model decodes, with tokens of a dataset or random ones: ``mosa decode-bench``."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mosa.convert import open_given_dataset
from megatron_mosa.data import ValidationSamples
from megatron_mosa.errors import UserError
from megatron_mosa.hf.modeling_mosa import MosaForCausalLM
from megatron_mosa.tools.decoding.lengths import tokens_needed
from megatron_mosa.tools.decoding.loading import check_thresholds, find_device, load_model, require_cache
from megatron_mosa.tools.decoding.speed import DecodingSpeed, measure, random_tokens
from megatron_mosa.utils import counted, versions, write_atomically


@dataclass(frozen=True)
class BenchOptions:
    """Options of ``mosa decode-bench``."""

    path: Path
    batches: list[int]
    """Numbers of sequences."""

    context: int
    """Tokens in the cache before the timed ones."""

    steps: int
    """Of each of two repetitions."""

    data: Path | None = None
    """A built dataset, whose validation split the tokens are from; None: random tokens."""

    device: str = "auto"
    dtype: str = "auto"
    """"auto": bfloat16 on a GPU, else float32."""


def bench(options: BenchOptions, output: Path | None) -> None:
    """Time decoding for each number of sequences, print a table, and write JSON to ``output``.

    Raises:
        UserError: the model cannot decode, or the validation split has fewer tokens than needed.
    """
    device = find_device(options.device)
    is_gpu = device.type == "cuda"
    dtype = ("bfloat16" if is_gpu else "float32") if options.dtype == "auto" else options.dtype
    model, _ = load_model(options.path, options.device, dtype, require_cache, needs_tokenizer=False)
    check_thresholds(model, options.path)
    name = torch.cuda.get_device_name(device) if is_gpu else platform.processor() or platform.machine()
    print(f"Decoding {options.path} after {counted(options.context, 'token')}, {dtype}, on {name}", flush=True)
    rows: list[DecodingSpeed] = []
    for batch in options.batches:
        row = measure(model, *_tokens(model, batch, options))
        what = counted(batch, "sequence")
        print(f"{what}: {row.milliseconds_per_step:.2f} ms a step, {row.tokens_per_second:,.0f} tokens/s")
        rows.append(row)
    if output is not None:
        facts = {"model": str(options.path), "device": name, "dtype": dtype, "data": str(options.data or "random")}
        facts |= {"versions": versions("torch", "transformers", "triton"), "rows": [asdict(row) for row in rows]}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, json.dumps(facts, indent=1) + "\n")


def _tokens(model: MosaForCausalLM, batch: int, options: BenchOptions) -> tuple[Tensor, Tensor]:
    """Return a context [1, T], and what each of a batch of sequences continues with, [B, 3 N]."""
    context, each = options.context, 3 * options.steps
    if options.data is None:
        return random_tokens(model, batch, context, options.steps)
    mixture = open_given_dataset(options.data)
    if mixture.manifest.vocab_size > model.config.vocab_size:
        raise UserError(
            f"--data={options.data} has a vocabulary of {mixture.manifest.vocab_size}, but the model only "
            f"{model.config.vocab_size} tokens; pass a dataset built with the model's tokenizer"
        )
    available = min(manifest.splits["validation"]["tokens"] for manifest in mixture.manifests)
    if (needed := tokens_needed(context, options.steps)) > available:
        most = available - needed + context
        lower = f"lower it to at most {most}, or " if most > 0 else ""
        raise UserError(
            f"--context={context} needs {needed} tokens with those that are decoded, but the validation split of "
            f"--data={options.data} has {available}; {lower}omit --data for random tokens"
        )
    window = ValidationSamples(mixture, sequence_length=context + each, num_samples=batch)
    texts = torch.stack([window[number % len(window)]["tokens"] for number in range(batch)])
    return texts[:1, :context], texts[:, context:]
