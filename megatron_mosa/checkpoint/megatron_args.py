"""The description of a model in Megatron-LM's terms: the arguments that its checkpoints keep, read and written."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_mosa.checkpoint.model_config import model_config
from megatron_mosa.config import Config
from megatron_mosa.errors import UserError

# What both sides have; the rest is spelled out below.
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
# What a model must be to have a counterpart here; an argument that is not there has this value.
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
# Where an argument that is missing, or has another value, stands for the same.
_ALIKE: dict[str, tuple[Any, ...]] = {"onnx_safe": (False,), "num_experts": (0,), "mtp_num_layers": (0,)}
_EXPLICIT = ("position_embedding_type", "add_bias_linear")  # Megatron-LM's defaults are others


def to_megatron_args(config: Config, vocab_rows: int) -> Namespace:
    """Arguments of Megatron-LM for a model of dense heads whose embedding has ``vocab_rows`` rows.

    Raises:
        UserError: heads that Megatron-LM's GPT does not have.
    """
    for key, heads in (
        ("mosa.num_heads", config.mosa.num_heads),
        ("model.num_local_heads", config.model.num_local_heads),
    ):
        if heads:
            raise UserError(
                f"{key}={heads} has no counterpart in Megatron-LM, whose GPT has dense heads alone; expected for "
                "torch-dist: 0; this model goes to --to hf"
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
            "num_query_groups": groups or 1,  # Megatron-LM's default, which counts with group_query_attention alone
            "swiglu": config.model.activation == "swiglu",
            "untie_embeddings_and_output_weights": not config.model.tie_embeddings,
            "add_position_embedding": True,
            "use_rotary_position_embeddings": True,
            "seq_length": config.data.sequence_length,
            "padded_vocab_size": vocab_rows,
            "make_vocab_size_divisible_by": config.model.vocab_size_multiple,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "bias_gelu_fusion": False,  # the fused one is an approximation, and takes a bias
            "apply_query_key_layer_scaling": False,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
        }
    )


def from_megatron_args(args: Namespace, vocab_rows: int) -> Config:
    """The inverse, of the arguments that Megatron-LM keeps in a checkpoint.

    Raises:
        UserError: an argument that is missing or has no counterpart here.
    """
    theirs = vars(args)
    if "norm_epsilon" in theirs:  # as Megatron-LM called it before megatron-core 0.19
        theirs = theirs | {"layernorm_epsilon": theirs["norm_epsilon"]}
    for key, allowed in _FIXED.items():
        value = theirs.get(key, None if key in _EXPLICIT else allowed)
        if value != allowed and value not in _ALIKE.get(key, ()):
            raise UserError(f"args.{key}={value} has no counterpart here; expected {allowed}")
    try:
        tree: dict[str, dict[str, Any]] = {"model": {}, "mosa": {"num_heads": 0}, "data": {}}
        for key, (section, name) in _SAME.items():
            tree[section][name] = theirs[key]
        tree["model"] |= {
            "activation": "swiglu" if theirs["swiglu"] else "gelu",
            "tie_embeddings": not theirs["untie_embeddings_and_output_weights"],
            # Whatever the padding was a multiple of, these rows are one of themselves.
            "vocab_size_multiple": vocab_rows,
        }
        if theirs.get("group_query_attention"):
            tree["model"]["num_query_groups"] = theirs["num_query_groups"]
    except KeyError as error:
        raise UserError(f"args.{error.args[0]} is missing; it is no GPT that can be imported") from None
    return model_config(tree)
