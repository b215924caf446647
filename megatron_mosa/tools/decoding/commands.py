"""Implement the commands ``mosa generate``, ``mosa cache-report`` and ``mosa decode-bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.entry import check_output
from megatron_mosa.errors import UserError
from megatron_mosa.options import MOST_HEADS, MOST_STEPS, bounds
from megatron_mosa.tools.decoding.lengths import STEPS
from megatron_mosa.tools.decoding.sampling import Sampling

_LONGEST = 2**26  # tokens
_MOST_SEQUENCES = 2**16

ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", help="An exported model; or a checkpoint or run directory (exported to a temporary folder)."
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="auto: a GPU if available.")]
Dtype = Annotated[str, typer.Option("--dtype", metavar="auto|float32|bfloat16", help="auto: the stored dtype.")]
TokenizerPath = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="PATH", help="tokenizer.json, if the model has none; default: its dataset's."),
]


def generate(
    path: ModelPath,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The text to complete.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", metavar="FILE", help="Read the prompt from a file; -: standard input."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="Maximum number of new tokens.")
    ] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="N", help="Sample from the N most likely tokens; 0: all.")
    ] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the smallest set with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Random seed for sampling.")] = 0,
    causal_approximation: Annotated[
        str | None,
        typer.Option("--causal-approximation", metavar="prefix", help="For expert-choice models: slow and inexact."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: TokenizerPath = None,
) -> None:
    """Stream a completion of a prompt, without the prompt itself."""
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    require_model(path)
    from megatron_mosa.tools.decoding.generation import generate_text, read_prompt  # slow to import, as below

    text = read_prompt(prompt, prompt_file)
    generate_text(
        path,
        text,
        sampling,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        causal_approximation=causal_approximation,
    )


def cache_report(
    path: ModelPath,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N,...", help="Sequence lengths, such as 1000 or 4k (4 x 1024).")
    ] = "1k,2k,4k,8k,16k,32k,64k,128k",
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Use this text; default: random tokens.")
    ] = None,
    dense_heads: Annotated[
        int | None,
        typer.Option(
            "--dense-heads",
            metavar="N",
            callback=bounds(1, MOST_HEADS),
            help="Heads of the dense baseline; default: equal FLOPs.",
        ),
    ] = None,
    exact_up_to: Annotated[
        int,
        typer.Option(
            "--exact-up-to",
            metavar="N",
            callback=bounds(1, _LONGEST),
            help="Beyond this, dense heads see only the last N tokens.",
        ),
    ] = 16384,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Also write cache.json and cache.png there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: TokenizerPath = None,
) -> None:
    """Measure a model's cache size and compare it with a dense model's."""
    numbers = parse_lengths(lengths)
    check_output("--output", output, is_directory=True)
    require_model(path)
    from megatron_mosa.tools.decoding.cache_report import CacheReportOptions, report

    options = CacheReportOptions(path, numbers, text, dense_heads, exact_up_to, device, dtype, tokenizer)
    report(options, output, as_json=as_json)


def decode_bench(
    path: ModelPath,
    batch: Annotated[
        str, typer.Option("--batch", metavar="N,N,...", help="Numbers of sequences to decode at once.")
    ] = "1,64",
    context: Annotated[
        str, typer.Option("--context", metavar="N", help="Tokens in the cache, such as 1000 or 8k (8 x 1024).")
    ] = "8k",
    steps: Annotated[
        int,
        typer.Option(
            "--steps", metavar="N", callback=bounds(1, MOST_STEPS), help="Timed steps of each of two repetitions."
        ),
    ] = STEPS,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="A built dataset, for tokens of its validation split; default: random tokens.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.json", help="Also write all numbers there.")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="auto|float32|bfloat16", help="auto: bfloat16 on a GPU, else float32.")
    ] = "auto",
) -> None:
    """Measure how long a model takes to decode a token of one and of many sequences."""
    batches, lengths = _parse_batches(batch), parse_lengths(context, "context")
    if len(lengths) > 1:
        raise UserError(f"--context must be one number of tokens, got {context}")
    check_output("--output", output, suffix=".json")
    require_model(path)
    from megatron_mosa.tools.decoding.bench import BenchOptions, bench

    bench(BenchOptions(path, batches, lengths[0], steps, data, device, dtype), output)


def require_model(path: Path) -> None:
    """Report a path without a model before the imports, which take seconds.

    Raises:
        UserError: ``path`` holds no model.
    """
    from megatron_mosa.convert import find_model

    find_model(path)


def parse_lengths(text: str, option: str = "lengths") -> list[int]:
    """Parse comma-separated lengths such as ``1k,3000`` (k = 1024); return them in ascending order.

    Raises:
        UserError: a part is not a positive integer, with or without k.
    """
    lengths = set()
    example = "a number such as 1000 or 8k" if option == "context" else "a list such as 1000,4k,128k"
    for part in text.split(","):
        digits = part.strip().lower()
        factor = 1024 if digits.endswith("k") else 1
        digits = digits.removesuffix("k")
        if not (digits.isascii() and digits.isdecimal()) or len(digits) > 20 or int(digits) == 0:
            raise UserError(f"--{option}={text}: '{part}' is not a number of tokens; use {example}")
        lengths.add(factor * int(digits))
        if max(lengths) > _LONGEST:
            raise UserError(f"--{option}={text}: the longest may be {_LONGEST:,} tokens")
    return sorted(lengths)


def _parse_batches(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(
        word.isascii() and word.isdecimal() and len(word) < 20 and 1 <= int(word) <= _MOST_SEQUENCES for word in words
    ):
        raise UserError(
            f"--batch must be numbers of sequences from 1 to {_MOST_SEQUENCES:,}, such as 1,64, got {text or 'none'}"
        )
    numbers = list(map(int, words))
    if twice := next((number for number in numbers if numbers.count(number) > 1), None):
        raise UserError(f"--batch={text}: {twice} is given twice; give it once")
    return sorted(numbers)
