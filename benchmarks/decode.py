"""Decoding speed of MoSA models with thresholds and of a dense model, with torch and transformers alone.

    python -m benchmarks.decode --output decode.json

The models have the widths of the paper's Small (9 layers, h 1024, h' 64), random weights, and thresholds by which every
head selects a share of 1 / sparsity of random tokens. The cache is filled with one random sequence, copied for the
batch, and continues with different random tokens in each sequence. The timed calls process one token per sequence, in
bf16 on a GPU. Before that, a small copy of each model is checked: cached decoding must equal the forward pass.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_mosa.hf import sparse_mosa
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM
from megatron_mosa.hf.sparse_mosa import MosaHeads
from megatron_mosa.tools.decoding.speed import measure, random_tokens

SMALL = {
    "vocab_size": 8064, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9, "head_dim": 64,
    "max_position_embeddings": 1024, "selection": "threshold", "num_dense_heads": 0,
}  # fmt: skip
TOY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_dense_heads": 9},
    "equal FLOPs": {"num_dense_heads": 4, "num_mosa_heads": 210, "sparsity": 32},
    "equal perplexity": {"num_dense_heads": 4, "num_mosa_heads": 14, "sparsity": 32},
    "local": {"num_local_heads": 4, "local_window": 1024, "num_mosa_heads": 60, "sparsity": 128},
}


def build(config: MosaConfig, device: str, dtype: torch.dtype, spread: float | None = None) -> MosaForCausalLM:
    """Build a model with random weights, with thresholds at the quantiles of its scores on random tokens.

    Args:
        spread: standard deviation of all weights; None: that of a new model.
    """
    torch.manual_seed(0)
    model = MosaForCausalLM(config).to(device=device, dtype=dtype).eval()
    for parameter in model.parameters() if spread else ():
        torch.nn.init.normal_(parameter, std=spread)
    heads = [module for module in model.modules() if isinstance(module, MosaHeads)]

    def set_thresholds(module: MosaHeads, given: tuple[Any, ...]) -> None:
        scores = torch.sigmoid(given[0].float() @ module.router_weight.float().T).flatten(0, 1)  # [T, E]
        below = scores.quantile(1 - 1 / config.sparsity, dim=0, interpolation="lower")
        above = scores.where(scores > below, torch.inf).amin(dim=0)
        # Between two scores, not at one: in the first layer a score recurs with every occurrence of its token.
        module.thresholds.copy_((below + above) / 2)

    for module in heads:
        module.thresholds.fill_(0.5)
    hooks = [module.register_forward_pre_hook(set_thresholds) for module in heads]
    with torch.no_grad():
        model(torch.randint(config.vocab_size, (1, 4096), device=device), logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    for module in heads:
        module.prompts.shares.clear()  # of other thresholds
    return model


@torch.no_grad()
def check(changes: dict[str, Any], device: str) -> float:
    """Return the largest difference between decoded and full logits of a narrow fp32 copy, relative to their spread."""
    model = build(MosaConfig(**(SMALL | TOY | changes | {"local_window": 24})), device, torch.float32, spread=0.3)
    tokens = torch.randint(TOY["vocab_size"], (2, 160), device=device)
    expected, cache = model(tokens).logits, model.new_cache()
    found = [model(tokens[:, :100], **{CACHE: cache}).logits]
    found += [model(tokens[:, column : column + 1], **{CACHE: cache}).logits for column in range(100, 160)]
    difference = ((torch.cat(found, dim=1) - expected).abs().max() / expected.std()).item()
    if not difference < 1e-3:
        raise SystemExit(
            f"decoding is not the forward pass: logits differ by {difference:.1e} of their spread; nothing is timed"
        )
    return difference


def main() -> None:
    """Measure all models; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--plain", action="store_true", help="without the decoding kernels")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--toy", action="store_true", help="narrow models, for a quick test")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    results = []
    if options.plain:
        sparse_mosa.can_run_kernels = lambda states: False
    print("| model | batch | context | tokens/s | ms per step | cache, GiB (allocated) | prefill, tokens/s |")
    print("| --- |" + " ---: |" * 6)
    for name in options.models:
        difference = check(MODELS[name], device)
        model = build(MosaConfig(**(SMALL | (TOY if options.toy else {}) | MODELS[name])), device, dtype)
        model.captures_steps = not (options.eager or options.plain)
        for context in options.context:
            for batch in options.batch:
                row = {"model": name, "check": difference}
                row |= asdict(measure(model, *random_tokens(model, batch, context, options.steps)))
                results.append(row)
                print(
                    f"| {name} | {batch} | {context:,} | {row['tokens_per_second']:,.0f} | "
                    f"{row['milliseconds_per_step']:.2f} | {row['cache_gib']:.2f} ({row['cache_allocated_gib']:.2f}) | "
                    f"{row['prefill_tokens_per_second']:,.0f} |",
                    flush=True,
                )
        del model
    if options.output is not None:
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        facts = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
        facts["kernels"] = device == "cuda" and not options.plain
        facts["graphs"] = device == "cuda" and not (options.eager or options.plain)
        models = {name: SMALL | (TOY if options.toy else {}) | MODELS[name] for name in options.models}
        options.output.write_text(
            json.dumps(facts | {"models": models, "rows": results}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
