"""Convert model configurations to and from the arguments that Megatron-LM stores in its checkpoints."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_mosa.config import Config, head_counts
from megatron_mosa.convert.model_config import model_config
from megatron_mosa.errors import UserError

# Megatron-LM's arguments with a direct counterpart; the rest is spelled out below.
_SAME = {
    "num_layers": ("model", "num_layers"),
    "hidden_size": ("model", "hidden_size"),
    "num_attention_heads": ("model", "num_dense_heads"),
    "ffn_hidden_size": ("model", "ffn_hidden_size"),
    "kv_channels": ("model", "head_dim"),
    "normalization": ("model", "normalization"),
    "layernorm_epsilon": ("model", "layernorm_epsilon"),
    "rotary_percent": ("model", "rotary_percent"),
    "rotary_base": ("model", "rotary_base"),
    "init_method_std": ("model", "init_method_std"),
    "max_position_embeddings": ("data", "sequence_length"),
}
# Values that an argument must have for the model to be supported; a missing argument counts as this value.
_FIXED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "num_experts": None,
    "mtp_num_layers": None,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "multi_latent_attention": False,
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "squared_relu": False,
    "quick_geglu": False,
    "openai_gelu": False,
    "onnx_safe": None,
    "window_size": None,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "linear_attention_freq": None,
    "use_mup": False,
    "no_rope_freq": None,
    "heterogeneous_layers_config_path": None,
    "experimental_attention_variant": None,
}
# Other values with the same meaning as the required one.
_EQUIVALENT: dict[str, tuple[Any, ...]] = {"onnx_safe": (False,), "num_experts": (0,), "mtp_num_layers": (0,)}
_EXPLICIT = ("position_embedding_type", "add_bias_linear")  # must be present: Megatron-LM's defaults differ


def to_megatron_args(config: Config, vocab_rows: int) -> Namespace:
    """Return Megatron-LM's arguments for a model of dense heads whose embedding has ``vocab_rows`` rows.

    Raises:
        UserError: the model has heads that Megatron-LM's GPT does not support.
    """
    for kind, (key, heads) in head_counts(config).items():
        if heads and kind != "dense":
            raise UserError(
                f"{key}={heads} has no counterpart in Megatron-LM, whose GPT has only dense heads, and must be 0 for "
                "--to torch-dist; export this model with --to hf"
            )
    if config.model.attention_gate:
        raise UserError(
            "model.attention_gate=true has no counterpart in Megatron-LM, whose gate has a value for each channel, and "
            "must be false for --to torch-dist; export this model with --to hf"
        )
    ours: Mapping[str, Any] = {"model": config.model, "data": config.data}
    values = {key: getattr(ours[section], name) for key, (section, name) in _SAME.items()}
    groups = config.model.num_query_groups
    return Namespace(
        **values
        | _FIXED
        | {
            "norm_epsilon": config.model.layernorm_epsilon,
            "ffn_hidden_size": config.model.mlp_width,
            "group_query_attention": groups is not None,
            "num_query_groups": groups or 1,  # Megatron-LM's default, used only with group_query_attention
            "swiglu": config.model.activation == "swiglu",
            "untie_embeddings_and_output_weights": not config.model.tie_embeddings,
            "add_position_embedding": True,
            "use_rotary_position_embeddings": True,
            "seq_length": config.data.sequence_length,
            "padded_vocab_size": vocab_rows,
            "make_vocab_size_divisible_by": config.model.vocab_size_multiple,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "bias_gelu_fusion": False,  # the fused kernel is an approximation and needs a bias
            "apply_query_key_layer_scaling": False,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
        }
    )


def from_megatron_args(args: Namespace, vocab_rows: int) -> Config:
    """Return the configuration for the arguments stored in a Megatron-LM checkpoint; inverse of ``to_megatron_args``.

    Raises:
        UserError: an argument is missing or not supported.
    """
    theirs = vars(args)
    if "norm_epsilon" in theirs:  # Megatron-LM's name before megatron-core 0.19
        theirs = theirs | {"layernorm_epsilon": theirs["norm_epsilon"]}
    for key, required in _FIXED.items():
        value = theirs.get(key, None if key in _EXPLICIT else required)
        if value != required and value not in _EQUIVALENT.get(key, ()):
            raise UserError(f"args.{key}={value} is not supported; it must be {required}")
    try:
        tree: dict[str, dict[str, Any]] = {"model": {}, "mosa": {"num_heads": 0}, "data": {}}
        for key, (section, name) in _SAME.items():
            tree[section][name] = theirs[key]
        tree["model"] |= {
            "activation": "swiglu" if theirs["swiglu"] else "gelu",
            "tie_embeddings": not theirs["untie_embeddings_and_output_weights"],
            # The original multiple is unknown; the number of rows is a multiple of itself.
            "vocab_size_multiple": vocab_rows,
        }
        if theirs.get("group_query_attention"):
            tree["model"]["num_query_groups"] = theirs["num_query_groups"]
    except KeyError as error:
        raise UserError(f"args.{error.args[0]} is missing; only GPT models can be imported") from None
    return model_config(tree)
