"""Construction of a Megatron-core GPTModel from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention import MosaTransformerConfig, get_mosa_block_spec, local_window
from megatron_mosa.config import Config, padded_vocab_size
from megatron_mosa.kernels import AnyDocuments, Documents
from megatron_mosa.model.initialization import draw_state, initial_weights, mark_partitioned
from megatron_mosa.model.mosa_gpt import MosaGPTModel


def transformer_config(config: Config, params_dtype: torch.dtype = torch.float32) -> MosaTransformerConfig:
    """Translate a configuration into Megatron-core's."""
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
        num_fixed_heads=model.num_fixed_heads,
        mosa_fixed_stride=config.fixed_stride,
        num_routing_heads=model.num_routing_heads,
        mosa_routing_clusters=config.routing_clusters,
        mosa_routing_decay=model.routing_decay,
        mosa_attention_gate=model.attention_gate,
        kv_channels=model.head_dim,
        num_mosa_heads=mosa.num_heads,
        mosa_sparsity=mosa.sparsity,
        mosa_include_first_token=mosa.include_first_token,
        mosa_selection=mosa.selection,
        mosa_capacity_factor=mosa.capacity_factor,
        mosa_threshold_ema=mosa.threshold_ema,
        mosa_load_feedback=mosa.load_feedback,
        mosa_balance_rate=mosa.balance_rate,
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
        use_cpu_initialization=True,  # the engine moves the model to the device
        perform_initialization=False,  # see initialization.py
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # These fusions need apex, Transformer Engine or Megatron's gradient buffers.
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )


def build_model(config: Config, vocab_size: int, params_dtype: torch.dtype = torch.float32) -> MosaGPTModel:
    """Build a GPT with MoSA layers on the CPU, with the weights of ``initial_weights``."""
    model = build_empty_model(config, vocab_size, params_dtype)
    for parameter, weight in initial_weights(model, config.run.seed):
        parameter.data.copy_(weight)
    draw_state(model, config.run.seed)
    return model


def build_empty_model(config: Config, vocab_size: int, params_dtype: torch.dtype = torch.float32) -> MosaGPTModel:
    """Build the same model with uninitialized weights (except norms).

    Needs initialized process groups.

    Args:
        vocab_size: number of tokens of the tokenizer; padded here to ``model.vocab_size_multiple``.
    """
    transformer = transformer_config(config, params_dtype)
    model = MosaGPTModel(
        transformer,
        cast(Any, get_mosa_block_spec(transformer)),  # GPTModel accepts a block's spec, too, unlike its type hint
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
    documents: AnyDocuments | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the sum of the token losses and the number of tokens that count.

    Args:
        model: a MosaGPTModel, its forward pass, or an engine around it.
        tokens, labels: int64 [B, T].
        loss_mask: [B, T], 1 where the label counts.
        document_starts: int64 [B, T], preferably on the CPU: the position where each token's document begins, for a
            model whose attention stays within documents.
        documents: the same, instead.

    Returns:
        Two fp32 scalars: the sum of the cross entropies in nats, and the number of tokens that count.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if document_starts is not None:
        documents = Documents.from_starts(document_starts, tokens.device)
    return model(tokens, positions, documents, labels=labels, loss_mask=loss_mask), loss_mask.sum()
