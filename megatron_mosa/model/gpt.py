"""From a configuration to a Megatron-core GPTModel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention import MosaTransformerConfig, get_mosa_block_spec
from megatron_mosa.config import Config, padded_vocab_size
from megatron_mosa.kernels import Documents
from megatron_mosa.model.costs import local_window
from megatron_mosa.model.initialization import initial_weights, mark_partitioned
from megatron_mosa.model.mosa_gpt import MosaGPTModel


def transformer_config(config: Config, params_dtype: torch.dtype = torch.float32) -> MosaTransformerConfig:
    """Translate our configuration into Megatron-core's."""
    model, mosa, parallel = config.model, config.mosa, config.parallel
    # Sequence parallelism splits over the tensor-parallel group; with one rank there is nothing to split.
    sequence_parallel = parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1
    return MosaTransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.mlp_width,
        num_attention_heads=model.num_dense_heads,
        num_query_groups=model.num_query_groups,
        num_local_heads=model.num_local_heads,
        mosa_local_window=local_window(config),
        kv_channels=model.head_dim,
        num_mosa_heads=mosa.num_heads,
        mosa_sparsity=mosa.sparsity,
        mosa_include_first_token=mosa.include_first_token,
        mosa_selection=mosa.selection,
        mosa_capacity_factor=mosa.capacity_factor,
        mosa_threshold_ema=mosa.threshold_ema,
        mosa_load_feedback=mosa.load_feedback,
        mosa_threshold_warmup_steps=mosa.threshold_warmup_steps,
        mosa_selection_scope=mosa.selection_scope,
        mosa_attend_within_documents=model.attend_within_documents,
        mosa_restart_rotary=model.restart_rotary,
        mosa_rotary_percent=model.rotary_percent,
        mosa_rotary_base=model.rotary_base,
        mosa_backend=mosa.backend,
        mosa_recompute=config.train.recompute,
        mosa_apex_norms=config.train.apex != "never",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=sequence_parallel,
        params_dtype=params_dtype,
        layernorm_epsilon=model.layernorm_epsilon,
        init_method_std=model.init_method_std,
        normalization=cast(Any, model.normalization),
        gated_linear_unit=model.activation == "swiglu",
        activation_func=F.silu if model.activation == "swiglu" else F.gelu,
        use_cpu_initialization=True,  # the engine moves the model where it belongs
        perform_initialization=False,  # see initialization.py
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Fusions that need apex, Transformer Engine or Megatron's own gradient buffers.
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )


def build_model(config: Config, vocab_size: int, params_dtype: torch.dtype = torch.float32) -> MosaGPTModel:
    """A GPT with MoSA layers, on the CPU, with the weights of ``initial_weights``."""
    model = build_empty_model(config, vocab_size, params_dtype)
    for parameter, weight in initial_weights(model, config.run.seed):
        parameter.data.copy_(weight)
    return model


def build_empty_model(config: Config, vocab_size: int, params_dtype: torch.dtype = torch.float32) -> MosaGPTModel:
    """The same model with memory for its weights but no values in them (norms excepted).

    Args:
        config: a checked configuration; the process groups must be up.
        vocab_size: tokens in the tokenizer; padded here to ``model.vocab_size_multiple``.
        params_dtype: type of the parameters.
    """
    transformer = transformer_config(config, params_dtype)
    model = MosaGPTModel(
        transformer,
        cast(Any, get_mosa_block_spec(transformer)),  # GPTModel takes a block's spec too, only unannounced
        vocab_size=padded_vocab_size(vocab_size, config.model.vocab_size_multiple),
        max_sequence_length=config.data.sequence_length,
        position_embedding_type="none",
        share_embeddings_and_output_weights=config.model.tie_embeddings,
    )
    mark_partitioned(model)
    return model


def language_model_loss(
    model: Callable[..., Tensor],
    tokens: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of the token losses and number of tokens that count.

    Args:
        model: a MosaGPTModel, its forward pass, or an engine around one.
        tokens, labels: int64 [B, T].
        loss_mask: [B, T], 1 where the label counts.
        document_starts: int64 [B, T], best on the CPU: where each token's document begins, for a model whose attention
            stays inside documents.

    Returns:
        Two fp32 scalars: the sum of the cross entropies in nats, and the number of tokens.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    documents = None if document_starts is None else Documents.from_starts(document_starts, tokens.device)
    return model(tokens, positions, documents, labels=labels, loss_mask=loss_mask), loss_mask.sum()
