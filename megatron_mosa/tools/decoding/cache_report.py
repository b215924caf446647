"""Measure a model's cache size by filling it, and compare it with that of a dense model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from megatron_mosa.errors import UserError
from megatron_mosa.hf import dense_mosa
from megatron_mosa.hf.cache_mosa import MosaCache
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM
from megatron_mosa.metrics import load_pyplot, save_figure
from megatron_mosa.tools.decoding.loading import check_thresholds, load_model, read_document, require_cache
from megatron_mosa.utils import counted, table_console, write_atomically

_CHUNK = 1024  # tokens per forward pass
_MIB = 2**20


@dataclass(frozen=True)
class CacheReportOptions:
    """Options of ``mosa cache-report``."""

    path: Path
    lengths: list[int]
    text: Path | None = None
    dense_heads: int | None = None
    exact_up_to: int = 16384
    device: str = "auto"
    dtype: str = "auto"
    tokenizer: Path | None = None


@dataclass(frozen=True)
class CacheSize:
    """Cache sizes of one sequence of ``length`` tokens, in bytes."""

    length: int
    used: dict[str, int]
    """Bytes of stored keys and values, by kind of heads."""

    allocated: int
    """Bytes allocated for all kinds, including spare capacity, partly filled blocks and the block table."""

    selected_share: float | None
    """Mean share of tokens that a MoSA head has selected; None: the model has no MoSA heads."""

    most_over_mean: float | None
    """The largest number of tokens of a MoSA head divided by the layer's mean, for the layer where it is largest."""

    dense_baseline: int
    """Bytes of the dense model's cache."""

    exact: bool
    """Whether dense heads attended to all previous tokens."""

    @property
    def total(self) -> int:
        """Bytes in use by all kinds of heads."""
        return sum(self.used.values())


def report(options: CacheReportOptions, output: Path | None, *, as_json: bool) -> None:
    """Measure the cache, print a table or JSON, and write cache.json and cache.png to ``output``.

    Raises:
        UserError: the model has no cache, its thresholds are not calibrated, or the text is too short.
    """
    model, tokenizer = load_model(options.path, options.device, options.dtype, require_cache, options.tokenizer)
    check_thresholds(model, options.path)
    heads, reason = baseline_heads(model.config, options.dense_heads)
    tokens = _tokens(options, model.config, tokenizer)
    rows = measure(model, tokens, options.lengths, heads, options.exact_up_to)
    facts = {
        "model": str(options.path),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens": f"from {options.text}" if options.text else "random",
        "baseline": f"{counted(heads, 'dense head')} per layer ({reason}), keys and values of every token, computed",
        "sparsity": model.config.sparsity if model.config.num_mosa_heads else None,
    }
    content = facts | {"rows": [asdict(row) | {"total": row.total} for row in rows]}
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        print_report(facts, rows, table_console())
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "cache.json", json.dumps(content, indent=2) + "\n")
        plot(rows, facts, output / "cache.png")


def baseline_heads(config: MosaConfig, given: int | None) -> tuple[int, str]:
    """Return the number of heads per layer of the dense baseline, and the reason for it.

    The default is the smallest number with which a dense model of the same depth, widths and MLP needs at least as many
    FLOPs as this one, by the paper's formulas (section 2) for the forward pass at the training length.
    """
    if given is not None:
        return given, "--dense-heads"
    from megatron_mosa.attention import KINDS, dense_head_flops
    from megatron_mosa.convert import from_transformers

    length = config.max_position_embeddings
    dense = dense_head_flops(config.hidden_size, config.head_dim, length)
    ours, _ = from_transformers(config.to_dict())
    layer = sum(kind.paper_flops(ours) for kind in KINDS)
    return -(-layer // dense), f"equal FLOPs at {length} tokens"


def _tokens(options: CacheReportOptions, config: MosaConfig, tokenizer: Any) -> Tensor:
    """Return tokens [1, T] for the largest requested length T."""
    needed = options.lengths[-1]
    if options.text is None:
        return torch.randint(config.vocab_size, (1, needed), generator=torch.Generator().manual_seed(0))
    if tokenizer is None:
        raise UserError(
            f"--text={options.text}: '{options.path}' has no tokenizer.json; pass --tokenizer PATH, or omit --text"
        )
    text = read_document("--text", options.text)
    ids = tokenizer(text, return_tensors="pt", verbose=False, add_special_tokens=False).input_ids
    if ids.shape[1] < needed:
        raise UserError(
            f"--text={options.text} has only {counted(ids.shape[1], 'token')}, but --lengths asks for {needed:,}; "
            "pass a longer text or shorter lengths"
        )
    return ids[:, :needed]


@torch.no_grad()
def measure(
    model: MosaForCausalLM, tokens: Tensor, lengths: list[int], dense_heads: int, exact_up_to: int
) -> list[CacheSize]:
    """Feed tokens [1, T] into one cache, chunk by chunk, and record its size at each of the ascending ``lengths``.

    Args:
        model: a model that can decode.
        tokens: at least as many tokens as the largest length.
        lengths: sequence lengths to record, ascending.
        dense_heads: heads per layer of the dense baseline.
        exact_up_to: dense heads attend to at most this many of the last tokens, so that long sequences finish on a CPU.
            Up to this length the result is exact. Beyond it, the cache still holds all keys of dense heads, but layers
            after the first select from slightly different hidden states.
    """
    from tqdm import tqdm

    config, cache, rows = model.config, model.new_cache(), []
    pair = 2 * config.num_hidden_layers * config.head_dim * model.dtype.itemsize  # a key and a value in all layers
    with _dense_heads_see(exact_up_to), tqdm(total=lengths[-1], unit=" tokens", file=sys.stderr) as progress:
        for length in lengths:
            while (start := cache.get_seq_length()) < length:
                chunk = tokens[:, start : min(start + _CHUNK, length)].to(model.device)
                model(chunk, logits_to_keep=1, **{CACHE: cache})
                progress.update(chunk.shape[1])
            rows.append(_row(cache, config, length, pair * dense_heads * length, exact_up_to))
    return rows


@contextmanager
def _dense_heads_see(last: int) -> Iterator[None]:
    """Restrict dense heads to the last ``last`` keys, or to as many keys as there are queries if that is more."""
    exact = dense_mosa.causal_attention

    def bounded(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None) -> Tensor:
        seen = max(last, query.shape[2])
        return exact(query, key[:, :, -seen:], value[:, :, -seen:], valid)

    dense_mosa.causal_attention = bounded
    try:
        yield
    finally:
        dense_mosa.causal_attention = exact


def _row(cache: MosaCache, config: MosaConfig, length: int, baseline: int, exact_up_to: int) -> CacheSize:
    sizes = cache.bytes()
    counts = [layer.mosa.counts.float() for layer in cache.layers if layer.mosa and layer.mosa.counts is not None]
    return CacheSize(
        length=length,
        used={kind: used for kind, (_, used) in sizes.items()},
        allocated=sum(allocated for allocated, _ in sizes.values()),
        selected_share=float(torch.stack(counts).mean()) / length if counts else None,
        most_over_mean=max((float(count.max() / count.mean()) for count in counts if count.any()), default=None),
        dense_baseline=baseline,
        exact=length <= exact_up_to or not config.num_dense_heads,
    )


def print_report(facts: dict[str, Any], rows: list[CacheSize], console: Console) -> None:
    """Print the report as tables."""
    about = Table(title=f"Cache of {facts['model']}", title_justify="left", show_header=False)
    for name, fact in facts.items():
        if fact is not None:
            about.add_row(name, Text(str(fact)))
    console.print(about)
    kinds = list(rows[0].used)
    table = Table(title="MiB of one sequence", title_justify="left", caption_justify="left")
    names = [*(f"{kind} heads" for kind in kinds), "cache", "allocated", "dense model", "share", "selected"]
    for name in ("tokens", *names, "most / mean"):
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        sizes = [*(row.used[kind] for kind in kinds), row.total, row.allocated, row.dense_baseline]
        table.add_row(
            f"{row.length:,}{'' if row.exact else '*'}",
            *(f"{size / _MIB:.2f}" for size in sizes),
            f"{100 * row.total / row.dense_baseline:.1f} %",
            "" if row.selected_share is None else f"{100 * row.selected_share:.2f} %",
            "" if row.most_over_mean is None else f"{row.most_over_mean:.2f}",
        )
    if not all(row.exact for row in rows):
        table.caption = "* dense heads attended only to the last tokens (--exact-up-to); the cache holds all of them"
    console.print(table)


def plot(rows: list[CacheSize], facts: dict[str, Any], path: Path) -> None:
    """Plot used and allocated bytes and the dense model's bytes over the length to a PNG file."""
    plt = load_pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lengths = [row.length for row in rows]
    baseline = facts["baseline"].partition(",")[0]
    axes.plot(lengths, [row.dense_baseline / _MIB for row in rows], "k--", label=f"{baseline}, computed")
    axes.plot(lengths, [row.allocated / _MIB for row in rows], ":", marker=".", label="this model, allocated")
    axes.plot(lengths, [row.total / _MIB for row in rows], marker="o", label="this model, in use")
    for kind in rows[0].used if len(rows[0].used) > 1 else []:
        axes.plot(lengths, [row.used[kind] / _MIB for row in rows], linewidth=1, alpha=0.6, label=f"{kind} heads")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens per sequence")
    axes.set_ylabel(f"MiB of keys and values ({facts['dtype']})")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)  # so that it covers no line
    save_figure(figure, path, dpi=120)
