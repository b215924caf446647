"""Generate the model card (README.md) of an exported model from its checkpoint and run directory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_mosa.attention import KINDS, looks_ahead
from megatron_mosa.checkpoint import Metadata
from megatron_mosa.config import Config
from megatron_mosa.errors import UserError
from megatron_mosa.metrics import causality_label, read_journal
from megatron_mosa.utils import counted


def model_card(
    metadata: Metadata, config: Config, checkpoint: Path, facts: dict[str, str], *, lacks_thresholds: bool
) -> str:
    """Return the card as Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        metadata: metadata of the checkpoint.
        config: the model's configuration, see ``model_config``.
        checkpoint: the checkpoint folder; losses come from metrics.jsonl in the run directory that contains it.
        facts: additional table rows supplied by the exporter, keyed by name.
        lacks_thresholds: heads that select by thresholds have some that no update has set.
    """
    # mosa.selection means nothing without MoSA heads: such a model is always causal.
    selection = getattr(config.mosa, "selection", "expert_choice") if config.mosa.num_heads else "none"
    selection = "routing" if config.model.num_routing_heads else selection
    selection = "unset" if lacks_thresholds else selection
    rows = (
        {"model": _model(config)}
        | facts
        | {
            "training": f"step {metadata.step:,}, {counted(metadata.consumed_samples, 'sequence')} of "
            f"{config.data.sequence_length:,} tokens",
            "data": _data(metadata),
        }
        | _losses(metadata.step, checkpoint, lacks_thresholds or looks_ahead(config))
        | {"written by": ", ".join(f"{name} {version}" for name, version in sorted(metadata.versions.items()))}
    )
    table = "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows.items())
    return _CARD.format(table=table, generation=_GENERATION[selection], documents=_documents(config))


def _model(config: Config) -> str:
    model = config.model
    heads = [kind.describe(config) for kind in KINDS if kind.count(config)]
    gate = "; dense and local heads are gated" if model.attention_gate else ""
    return (
        f"{counted(model.num_layers, 'layer')} of width {model.hidden_size} with {', '.join(heads)} heads of width "
        f"{model.head_dim}; {model.normalization}, {model.activation}, MLP of width {model.ffn_hidden_size}{gate}"
    )


def _data(metadata: Metadata) -> str:
    data, fingerprint = metadata.config.get("data", {}), metadata.data.get("fingerprint")
    if not fingerprint:
        return "unknown: not recorded in the checkpoint"
    names = data.get("blend") or metadata.data.get("sources") or _sources_of(data.get("path"), fingerprint)
    return f"{', '.join(names)} (fingerprint {fingerprint})" if names else f"fingerprint {fingerprint}"


def _sources_of(path: str | None, fingerprint: str) -> list[str]:
    """Return the sources of a dataset, which earlier checkpoints do not record, if it is still the one of the run."""
    from megatron_mosa.data import load_manifest

    if path is None:
        return []
    with suppress(UserError):
        manifest = load_manifest(Path(path).expanduser())
        return manifest.source_names if manifest.fingerprint == fingerprint else []
    return []


def _losses(step: int, checkpoint: Path, is_looking_ahead: bool) -> dict[str, str]:
    lines = [
        line for line in read_journal(checkpoint.resolve().parent.parent / "metrics.jsonl") if line["step"] <= step
    ]
    found = {}
    for name, key in (("training loss", "loss"), ("validation loss", "validation_loss")):
        line = next((line for line in reversed(lines) if isinstance(line.get(key), float)), None)
        if line is not None:
            label = causality_label(
                line.get("causal", not is_looking_ahead)
            )  # per line: the warm-up uses expert choice
            found[name] = f"{line[key]:.4f} nats per token at step {line['step']:,} ({label})"
    return found or {"losses": "unknown: no metrics.jsonl in the run directory"}


def _documents(config: Config) -> str:
    return _WITHIN if config.model.attend_within_documents else ""


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


_GENERATION = {
    "expert_choice": """**Expert choice is not causal.** A MoSA head selects the tokens with the largest scores in the
whole sequence, so the prediction at a token depends on later tokens, and no decoder can reach the losses above. Use the
model to score and embed whole sequences. `generate` is refused unless you explicitly request an approximation:
`generate(..., causal_approximation="prefix")` reselects tokens from the prefix for every new token. This is slow and is
not what the model was trained for.""",
    "threshold": """All heads are causal: a MoSA head selects a token if its score is above the head's threshold.
`generate` caches keys and values of the selected tokens only. Pad prompts of different lengths on the left
(`tokenizer.padding_side = "left"`).""",
    "unset": """**The thresholds of MoSA heads are not set** (NaN), because no optimizer step has been taken, so every
forward pass is refused. Import the folder with `mosa checkpoint import` and train it.""",
    "token_choice": """All heads are causal: each token chooses the MoSA heads that select it, by its own scores.
`generate` caches keys and values of the selected tokens only. Pad prompts of different lengths on the left
(`tokenizer.padding_side = "left"`).""",
    "routing": """**Routing heads are not causal.** Each of their centroids takes the tokens nearest to it in the whole
sequence, so the prediction at a token depends on later tokens, and no decoder can reach the losses above. Use the model
to score and embed whole sequences. `generate` is refused unless you explicitly request an approximation:
`generate(..., causal_approximation="prefix")` forms the clusters of the prefix anew for every new token. This is slow
and is not what the model was trained for.""",
    "none": """All heads are causal. `generate` caches keys and values. Pad prompts of different lengths on the left
(`tokenizer.padding_side = "left"`).""",
}
_WITHIN = """
The model was trained on packed sequences with attention within documents; here every sequence is one document.
"""
_CARD = """---
library_name: transformers
tags: [mosa, megatron_mosa]
---

# A MoSA language model

Mixture of Sparse Attention ([arXiv 2505.00315](https://arxiv.org/abs/2505.00315)), exported by megatron_mosa.

| | |
| --- | --- |
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
batch = tokenizer(["some text", "some more of it"], padding=True, return_tensors="pt")
logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # [B, T, vocab_size]
```

The model's code is in this folder. The tokenizer does not need it: without `trust_remote_code`, transformers may ask
whether to run the code, and loads the tokenizer whatever you answer.

{generation}
{documents}
Padding may be on either side if `attention_mask` marks it; it does not affect the outputs at other tokens.
`vocab_size` is the number of rows of the embedding, vocabulary padding included.
"""
