"""Megatron-core's TransformerConfig with the options of MoSA."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mosa.attention.functional import num_selected_tokens
from megatron_mosa.config import ModelSection, MosaSection, TrainSection, default_load_feedback, keys_of

# The fields "mosa_NAME" that have the same choices and bounds as NAME in a configuration file.
_KEYS = {
    name: key
    for section, names in (
        (MosaSection, ("sparsity", "selection", "selection_scope", "capacity_factor", "load_feedback")),
        (MosaSection, ("threshold_ema", "threshold_warmup_steps", "balance_rate")),
        (ModelSection, ("rotary_percent", "rotary_base", "routing_decay")),
        (TrainSection, ("recompute",)),
    )
    for name, key in keys_of(section).items()
    if name in names
}

# Megatron-core's options for what MoSA layers do not have; they would be ignored.
_UNSUPPORTED = {
    "qk_layernorm",
    "qk_l2_norm",
    "qk_clip",
    "softmax_scale",
    "softmax_type",
    "window_size",
    "attention_output_gate",
    "rotary_interleaved",
    "no_rope_freq",
    "multi_latent_attention",
    "experimental_attention_variant",
    "linear_attention_freq",
    "num_moe_experts",
    "mtp_num_layers",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "use_mup",
    "fp8",
    "fp4",
}

# The fields that count the heads of each kind.
HEAD_FIELDS = {
    "dense": "num_attention_heads",
    "local": "num_local_heads",
    "fixed": "num_fixed_heads",
    "routing": "num_routing_heads",
    "mosa": "num_mosa_heads",
}


@dataclass
class MosaTransformerConfig(TransformerConfig):
    """The configuration of a transformer with dense, local, fixed, Routing and MoSA heads in each layer.

    ``num_attention_heads`` counts only dense heads (0: none). ``kv_channels``, the width of every head, must be set.
    Build GPTModel with ``position_embedding_type="none"``: the layer applies rotary embeddings itself, because MoSA
    heads need the original positions of their selected tokens.
    """

    num_mosa_heads: int = 0
    """E, the number of MoSA heads over all tensor-parallel ranks."""

    num_local_heads: int = 0
    """Number of sliding-window heads over all tensor-parallel ranks."""

    mosa_local_window: int = 0
    """Number of tokens that a local head attends to, including the token itself."""

    num_fixed_heads: int = 0
    """Number of heads on every ``mosa_fixed_stride``-th token, over all tensor-parallel ranks."""

    mosa_fixed_stride: int = 0
    """Fixed heads attend among tokens 0, this, twice this, ... of the sequence."""

    num_routing_heads: int = 0
    """Number of heads of the Routing Transformer, over all tensor-parallel ranks; not causal."""

    mosa_routing_clusters: int = 0
    """rho, the number of centroids of a Routing head; each takes the max(floor(T / rho), 2) tokens nearest to it."""

    mosa_routing_decay: float = 0.999
    """What a centroid keeps of itself when it moves towards the mean of its tokens in ``update_thresholds``, which must
    be called after each optimizer step."""

    mosa_attention_gate: bool = False
    """Multiply the output of each dense and local head by a sigmoid of a linear function of the token's state."""

    mosa_sparsity: float = 16.0
    """rho: a head selects k = max(floor(T / rho), 2) of T tokens."""

    mosa_include_first_token: bool = False
    """Always select token 0; within documents token 0 of each (with scope "sequence": of the first k documents)."""

    mosa_selection: str = "expert_choice"
    """expert_choice: the k tokens with the largest scores; threshold: every token whose score is above its head's
    threshold; token_choice: each token goes to the round(E / rho) heads of its largest scores. The latter two also
    select the first token (of each document), whatever ``mosa_include_first_token`` says; with them, call
    ``update_thresholds`` after each optimizer step."""

    mosa_capacity_factor: float = 1.25
    """With thresholds or token choice, in training: a head selects at most this times k tokens of a sequence, and drops
    later ones."""

    mosa_threshold_ema: float = 0.1
    """Weight of the last batch in the moving average of a threshold."""

    mosa_load_feedback: float | None = None
    """With thresholds: how much a head's threshold rises, in logits, for each token selected from the sequence (the
    document) beyond 1 / rho of the tokens so far; it falls if fewer were selected. None: 0.1."""

    mosa_balance_rate: float = 1e-3
    """With token choice: how much a head's bias changes in a step, towards equal loads of all heads."""

    mosa_threshold_warmup_steps: int = 250
    """Number of threshold updates before training selects by thresholds; until then it uses expert choice."""

    mosa_attend_within_documents: bool = False
    """All heads attend within documents; pass ``Documents`` as the model's ``attention_mask``."""

    mosa_selection_scope: str = "sequence"
    """sequence: select k tokens of each packed sequence; document: of each document, with the k of its length."""

    mosa_restart_rotary: bool = False
    """Count rotary positions from the beginning of the document instead of the sequence."""

    mosa_rotary_percent: float = 0.5
    """Share of the head dimension that is rotated, in all heads."""

    mosa_rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    mosa_backend: str = "auto"
    """Implementation of the MoSA heads: auto, naive or triton."""

    mosa_apex_norms: bool = True
    """Use NVIDIA apex's fused norms on GPUs if apex is installed."""

    mosa_recompute: str = "none"
    """Recomputed in backward instead of kept in memory: none, attention, or full (whole layers)."""

    def __post_init__(self) -> None:
        if self.kv_channels is None or self.kv_channels < 1:
            raise ValueError(
                f"kv_channels={self.kv_channels}; set it to the width of a head, dense or MoSA, of at least 1"
            )
        self._check_unsupported()
        super().__post_init__()
        size = self.tensor_model_parallel_size
        counts = {field: getattr(self, field) for field in HEAD_FIELDS.values()}
        if sum(counts.values()) < 1:
            raise ValueError(f"{', '.join(counts)} are all 0 and leave no head; expected at least one of them above 0")
        for name, heads in (counts | {"num_query_groups": self.num_query_groups or 0}).items():
            if heads < 0:
                raise ValueError(f"{name} must be at least 0, got {heads}")
            if heads % size:
                raise ValueError(f"{name}={heads} is not divisible by tensor_model_parallel_size={size}")
        if self.num_query_groups and self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by num_query_groups="
                f"{self.num_query_groups}"
            )
        if self.num_local_heads and self.mosa_local_window < 1:
            raise ValueError(f"mosa_local_window must be at least 1 with local heads, got {self.mosa_local_window}")
        if self.num_fixed_heads and self.mosa_fixed_stride < 1:
            raise ValueError(f"mosa_fixed_stride must be at least 1 with fixed heads, got {self.mosa_fixed_stride}")
        if self.num_routing_heads and self.mosa_routing_clusters < 2:
            raise ValueError(
                f"mosa_routing_clusters must be at least 2 with Routing heads, got {self.mosa_routing_clusters}"
            )
        if self.mosa_attention_gate and not self.num_attention_heads + self.num_local_heads:
            raise ValueError(
                "mosa_attention_gate=True gates dense and local heads, but there are none; set it to False"
            )
        if self.add_bias_linear or self.add_qkv_bias:
            raise ValueError("MoSA layers have no biases; set add_bias_linear=False and add_qkv_bias=False")
        if self.attention_dropout:
            raise ValueError(f"attention_dropout={self.attention_dropout} is not supported; expected 0.0")
        if self.hidden_dropout and self.mosa_recompute == "full":
            raise ValueError(
                f"hidden_dropout must be 0.0 with mosa_recompute='full', got {self.hidden_dropout}; recomputation "
                "would draw another mask"
            )
        if self.normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"normalization must be LayerNorm or RMSNorm, got {self.normalization}")
        self._check_values()
        self._check_selection()
        if not self.mosa_attend_within_documents and (
            self.mosa_selection_scope == "document" or self.mosa_restart_rotary
        ):
            raise ValueError(
                "mosa_selection_scope='document' and mosa_restart_rotary need mosa_attend_within_documents=True"
            )
        if self.recompute_granularity is not None:
            raise ValueError("recompute_granularity would select tokens twice; set mosa_recompute instead")
        for name in ("pipeline_model_parallel_size", "context_parallel_size"):
            if getattr(self, name) != 1:
                raise ValueError(f"{name}={getattr(self, name)} is not supported by MoSA layers yet; expected 1")

    def _check_unsupported(self) -> None:
        for field in fields(TransformerConfig):
            value = getattr(self, field.name)
            if field.name in _UNSUPPORTED and value != field.default:
                raise ValueError(f"{field.name}={value!r} is not supported by MoSA layers; expected {field.default!r}")

    def check_initialization(self) -> None:
        """Refuse to draw the same weights on every tensor-parallel rank; to be called where weights are drawn."""
        is_inference = getattr(random._CUDA_RNG_STATE_TRACKER, "is_inference_rng_tracker", False)
        draws_on_gpu = self.perform_initialization and not self.use_cpu_initialization
        if self.tensor_model_parallel_size > 1 and draws_on_gpu and is_inference:
            raise ValueError(
                f"tensor_model_parallel_size={self.tensor_model_parallel_size} with Megatron's tracker of generators "
                "for inference, as initialize_parallel sets it up, would give every rank the same weights; set "
                "use_cpu_initialization=True, or perform_initialization=False if weights are loaded"
            )

    def _check_values(self) -> None:
        for name, key in _KEYS.items():
            if message := key.error_message(f"mosa_{name}", getattr(self, f"mosa_{name}")):
                raise ValueError(message)

    def _check_selection(self) -> None:
        if self.mosa_selection != "expert_choice" and self.mosa_selection_scope == "document":
            raise ValueError(
                f"mosa_selection={self.mosa_selection!r} does not support mosa_selection_scope='document'; set "
                "'sequence'"
            )
        if self.mosa_selection == "token_choice" and self.num_mosa_heads and self.heads_per_token < 1:
            raise ValueError(
                f"mosa_sparsity={self.mosa_sparsity} leaves each token 0 of num_mosa_heads={self.num_mosa_heads} heads "
                f"to choose; set it below {2 * self.num_mosa_heads}"
            )
        if self.mosa_load_feedback and self.mosa_selection != "threshold":
            raise ValueError("mosa_load_feedback needs mosa_selection='threshold'; set it to 0 for expert choice")

    @property
    def load_feedback(self) -> float:
        """``mosa_load_feedback``, or its default."""
        given = self.mosa_load_feedback
        return default_load_feedback(self.mosa_selection) if given is None else given

    @property
    def head_dim(self) -> int:
        """The width h' of every head."""
        assert self.kv_channels is not None
        return self.kv_channels

    def num_selected(self, sequence_length: int) -> int:
        """Return k, the number of tokens to select from ``sequence_length`` tokens."""
        return num_selected_tokens(sequence_length, self.mosa_sparsity)

    def capacity(self, sequence_length: int) -> int:
        """Return the maximum number of tokens that a head selects in training, by threshold or token choice."""
        share: float = self.num_selected(sequence_length)
        if self.mosa_selection == "token_choice":
            share = sequence_length * self.heads_per_token / self.num_mosa_heads
        return min(math.ceil(self.mosa_capacity_factor * share), sequence_length)

    @property
    def heads_per_token(self) -> int:
        """The number of MoSA heads that a token takes with token choice."""
        return round(self.num_mosa_heads / self.mosa_sparsity)
