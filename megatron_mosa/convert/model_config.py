"""Extract the model's configuration from a checkpoint, and convert it to and from transformers' configuration."""

from __future__ import annotations

import re
from typing import Any

from megatron_mosa.attention import KINDS
from megatron_mosa.config import Config, config_from_dict
from megatron_mosa.errors import UserError
from megatron_mosa.utils import first_line

NO_DATASET = "none"
"""``data.path`` of a model that came without a dataset."""

# Keys of MosaConfig with a direct counterpart; the rest is spelled out below.
_SAME = {
    "hidden_size": ("model", "hidden_size"),
    "intermediate_size": ("model", "ffn_hidden_size"),
    "num_hidden_layers": ("model", "num_layers"),
    "head_dim": ("model", "head_dim"),
    "num_dense_heads": ("model", "num_dense_heads"),
    "num_local_heads": ("model", "num_local_heads"),
    "norm_type": ("model", "normalization"),
    "norm_eps": ("model", "layernorm_epsilon"),
    "rotary_percent": ("model", "rotary_percent"),
    "rotary_base": ("model", "rotary_base"),
    "initializer_range": ("model", "init_method_std"),
    "tie_word_embeddings": ("model", "tie_embeddings"),
    "num_mosa_heads": ("mosa", "num_heads"),
    "sparsity": ("mosa", "sparsity"),
    "include_first_token": ("mosa", "include_first_token"),
    "max_position_embeddings": ("data", "sequence_length"),
}
# Keys that older exports and Llamas do not have.
_OPTIONAL = {
    "selection": ("mosa", "selection"),
    "load_feedback": ("mosa", "load_feedback"),
    "attend_within_documents": ("model", "attend_within_documents"),
    "restart_rotary": ("model", "restart_rotary"),
    "selection_scope": ("mosa", "selection_scope"),
    "attention_gate": ("model", "attention_gate"),
}
_ACTIVATIONS = {"gelu": "gelu", "swiglu": "silu"}


def model_config(tree: dict[str, Any]) -> Config:
    """Build a validated configuration of the model that ``tree`` describes, for a single CPU process in fp32.

    Args:
        tree: sections ``model`` and ``mosa``, and ``data.sequence_length``, as stored in checkpoints. Settings of the
            original run are ignored, so its data need not exist.

    Raises:
        UserError: a value is invalid.
    """
    return config_from_dict(
        {
            "run": {"name": "model"},
            "model": tree["model"],
            # Models from before load feedback record none.
            "mosa": {"load_feedback": 0.0} | tree["mosa"] | {"backend": "naive"},
            "data": {"path": NO_DATASET, "sequence_length": tree["data"]["sequence_length"]},
            "train": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1, "precision": "fp32"},
        }
    )


def check_vocabulary(subject: str, tokens: int, rows: int, fix: str) -> None:
    """Check that the embedding has a row for every token.

    Args:
        subject: what has so many tokens.
        tokens: one more than its highest token id.
        rows: of the embedding.
        fix: what the error tells the user to do.

    Raises:
        UserError: it has too few.
    """
    if tokens > rows:
        raise UserError(f"{subject} has {tokens:,} tokens, but the embedding only {rows:,} rows; {fix}")


def stored_to_transformers(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``MosaConfig``, vocabulary aside, for the configuration that a checkpoint keeps."""
    return {key: value for key, value in to_transformers(model_config(tree), 0).items() if key != "vocab_size"}


def to_transformers(config: Config, vocab_rows: int) -> dict[str, Any]:
    """Return the arguments of ``MosaConfig`` for a model whose embedding has ``vocab_rows`` rows."""
    ours = {"model": config.model, "mosa": config.mosa, "data": config.data}
    found = {key: getattr(ours[section], name) for key, (section, name) in (_SAME | _OPTIONAL).items()}
    for kind in KINDS:
        found |= kind.exported(config)
    return found | {
        "vocab_size": vocab_rows,
        "num_key_value_heads": config.model.num_query_groups or config.model.num_dense_heads,
        "hidden_act": _ACTIVATIONS[config.model.activation],
    }


def changed_settings(tree: dict[str, Any], config: Config) -> tuple[str, ...]:
    """Return what a model computes otherwise than that of a checkpoint with equal weights, each with both values.

    Args:
        tree: the configuration that the checkpoint keeps.
        config: of the model.
    """
    theirs, ours = stored_to_transformers(tree), to_transformers(config, 0)
    names = {key: ".".join(place) for key, place in (_SAME | _OPTIONAL).items()}
    names["hidden_act"] = "model.activation"
    without_effect = {"max_position_embeddings", "initializer_range"}
    return tuple(
        f"{names.get(key, key)}={ours[key]} (not {value})"
        for key, value in theirs.items()
        if key not in without_effect and ours[key] != value
    )


def from_transformers(content: dict[str, Any]) -> tuple[Config, int]:
    """Return the configuration and the number of embedding rows for the content of a ``config.json``.

    Raises:
        UserError: a key is missing or not supported, or the model type is neither "mosa" nor "llama".
    """
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in _READERS:
        raise UserError(f"config.json: model_type must be {' or '.join(_READERS)}, got {model_type}")
    try:
        theirs = _READERS[model_type](content)
        tree: dict[str, dict[str, Any]] = {"model": {}, "mosa": {}, "data": {}}
        for key, (section, name) in _SAME.items():
            tree[section][name] = theirs[key]
        for key, (section, name) in _OPTIONAL.items():
            if key in theirs:
                tree[section][name] = theirs[key]
        activation = {value: name for name, value in _ACTIVATIONS.items()}.get(theirs["hidden_act"])
        tree["model"]["activation"] = activation or theirs["hidden_act"]
        # The original multiple is unknown; the number of rows is a multiple of itself.
        tree["model"]["vocab_size_multiple"] = theirs["vocab_size"]
        if theirs["num_key_value_heads"] != theirs["num_dense_heads"]:
            tree["model"]["num_query_groups"] = theirs["num_key_value_heads"]
        for kind in KINDS:
            for key, value in kind.imported(theirs).items():
                section, _, name = key.partition(".")
                tree[section][name] = value
    except KeyError as error:
        raise UserError(
            f"config.json: {error.args[0]} is missing; importing a {model_type} model requires it"
        ) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json: a value has another type than expected ({first_line(error)})") from None
    try:
        return model_config(tree), theirs["vocab_size"]
    except UserError as error:
        raise UserError(f"config.json: {_in_their_words(str(error), model_type)}") from None


def _in_their_words(message: str, model_type: str) -> str:
    """Name the keys of ``config.json`` in place of ours, from which no user of an import has heard."""
    names = {".".join(place): key for key, place in (_SAME | _OPTIONAL).items()}
    names |= {"model.vocab_size_multiple": "vocab_size", "model.num_query_groups": "num_key_value_heads"}
    if model_type == "llama":
        names = {place: _OF_LLAMA.get(key, key) for place, key in names.items()}
    return re.sub(r"\b(model|mosa|data)\.\w+", lambda found: names.get(found[0], found[0]), message)


_OF_LLAMA = {"num_dense_heads": "num_attention_heads", "norm_eps": "rms_norm_eps", "rotary_base": "rope_theta"}


def _llama(content: dict[str, Any]) -> dict[str, Any]:
    """Describe a Llama with MosaConfig's keys: only dense heads, rotary on all channels, RMSNorm, SwiGLU."""
    heads = content["num_attention_heads"]
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json: rope_parameters (or rope_scaling) must be an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    for key, value, required in (
        ("attention_bias", content.get("attention_bias", False), False),
        ("mlp_bias", content.get("mlp_bias", False), False),
        ("hidden_act", content.get("hidden_act", "silu"), "silu"),
        ("rope_type", kind, "default"),
    ):
        if value != required:
            raise UserError(f"config.json: {key}={value} is not supported; for a Llama it must be {required}")
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    return {key: content[key] for key in same} | {
        "num_dense_heads": heads,
        "num_key_value_heads": content.get("num_key_value_heads") or heads,
        "head_dim": content.get("head_dim") or content["hidden_size"] // heads,
        "hidden_act": "silu",
        "norm_type": "RMSNorm",
        "norm_eps": content.get("rms_norm_eps", 1e-6),
        "rotary_percent": 1.0,
        "rotary_base": float(rope.get("rope_theta", content.get("rope_theta", 10000.0))),
        "initializer_range": content.get("initializer_range", 0.02),
        "tie_word_embeddings": content.get("tie_word_embeddings", False),
        "num_local_heads": 0,
        "num_mosa_heads": 0,
        "sparsity": 16.0,
        "include_first_token": True,
    }


_READERS = {"mosa": dict, "llama": _llama}
