"""The commands ``mosa generate`` and ``mosa cache-report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_mosa.errors import UserError

ModelPath = Annotated[
    Path,
    typer.Argument(metavar="PATH", help="An exported folder; or a checkpoint or run directory, exported on the way."),
]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="auto: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option("--dtype", metavar="auto|float32|bfloat16", help="auto: as it is stored.")]
TokenizerPath = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="PATH", help="Of a checkpoint: tokenizer.json; default: the dataset's."),
]


def generate(
    path: ModelPath,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="What to go on from.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="The same, from a file; -: standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="At most.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", metavar="N", help="Of the N most likely tokens; 0: of all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Of those that have this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
    causal_approximation: Annotated[
        str | None,
        typer.Option("--causal-approximation", metavar="prefix", help="For models with expert choice; see the docs."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: TokenizerPath = None,
) -> None:
    """Print what a model goes on with after a prompt, as it comes, without the prompt."""
    from megatron_mosa.decode.generation import Sampling, generate_text, read_prompt  # slow to import, as below

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
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
        str, typer.Option("--lengths", metavar="N,N,...", help="Tokens, such as 1000 or 4k (4 times 1024).")
    ] = "1k,2k,4k,8k,16k,32k,64k,128k",
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Tokens of this text; default: random ones.")
    ] = None,
    dense_heads: Annotated[
        int | None,
        typer.Option("--dense-heads", metavar="N", help="Of the dense model beside it; default: equal FLOPs."),
    ] = None,
    exact_up_to: Annotated[
        int, typer.Option("--exact-up-to", metavar="N", help="Beyond, dense heads see the last N tokens alone.")
    ] = 16384,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Write cache.json and cache.png there, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tokenizer: TokenizerPath = None,
) -> None:
    """Fill a cache and tell how large it is, against that of a dense model."""
    numbers = parse_lengths(lengths)
    for name, value in (("dense-heads", dense_heads), ("exact-up-to", exact_up_to)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} is out of range; expected 1 or more")
    from megatron_mosa.decode.cache_report import Request, report

    request = Request(path, numbers, text, dense_heads, exact_up_to, device, dtype, tokenizer)
    report(request, output, as_json=as_json)


def parse_lengths(text: str) -> list[int]:
    """Read ``1k,3000``, k being 1024; ascending.

    Raises:
        UserError: a part that is not a number of tokens.
    """
    lengths = set()
    for part in text.split(","):
        digits = part.strip().lower()
        factor = 1024 if digits.endswith("k") else 1
        digits = digits.removesuffix("k")
        if not digits.isdecimal() or int(digits) == 0:
            raise UserError(
                f"--lengths={text}: '{part}' is not a number of tokens; expected numbers such as 1000,4k,128k"
            )
        lengths.add(factor * int(digits))
    return sorted(lengths)
