"""Configuration of a MoSA language model (Mixture of Sparse Attention, arXiv 2505.00315) for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MosaConfig(PretrainedConfig):
    """What a MoSA language model is made of.

    Every layer adds up dense heads (all tokens before), local heads (a sliding window) and MoSA heads (each among the
    tokens that it selects); a number of 0 leaves a kind out.

    Args:
        vocab_size: rows of the embedding, padding included.
        hidden_size, intermediate_size, num_hidden_layers: h, the width of the MLP, layers.
        head_dim: h', the width of every head.
        num_dense_heads, num_key_value_heads: dense heads, and the key and value heads that they share in groups.
        num_local_heads, local_window: sliding-window heads; the tokens that each sees, the token itself included.
        num_mosa_heads, sparsity: E; each selects k = max(floor(T / sparsity), 2) of the T tokens of a sequence, or
            about as many by its threshold.
        selection: "expert_choice": the k tokens with the largest scores, which is not causal. "threshold": every token
            whose score is above the head's own threshold, and the first.
        load_feedback: of threshold: how much a head's threshold rises, in logits, for each token that it has taken of
            the sequence beyond 1 / sparsity of the tokens so far, and falls for each that it took less.
        include_first_token: expert choice always selects token 0.
        hidden_act: "gelu" (two matrices) or "silu" (three: SwiGLU).
        norm_type, norm_eps: "LayerNorm" (with a bias) or "RMSNorm".
        rotary_percent, rotary_base: share of a head's channels that is rotated; base of the frequencies.
        max_position_embeddings: the length of the sequences that the model was trained on; no limit.
        attend_within_documents, restart_rotary, selection_scope: how training kept apart the documents of one packed
            sequence: attention, positions, and what MoSA heads select among ("sequence" or "document"). Kept for
            training on; here a sequence is one document, for which they change nothing.

    Raises:
        ValueError: a word or number that is not allowed.
    """

    model_type = "mosa"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 8064,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 6,
        head_dim: int = 64,
        num_dense_heads: int = 4,
        num_key_value_heads: int | None = None,
        num_local_heads: int = 0,
        local_window: int = 0,
        num_mosa_heads: int = 0,
        sparsity: float = 16.0,
        selection: str = "expert_choice",
        load_feedback: float = 0.0,
        include_first_token: bool = True,
        hidden_act: str = "gelu",
        norm_type: str = "LayerNorm",
        norm_eps: float = 1e-5,
        rotary_percent: float = 0.5,
        rotary_base: float = 10000.0,
        max_position_embeddings: int = 1024,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        attend_within_documents: bool = False,
        restart_rotary: bool = False,
        selection_scope: str = "sequence",
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.head_dim = head_dim
        self.num_dense_heads = num_dense_heads
        self.num_key_value_heads = num_dense_heads if num_key_value_heads is None else num_key_value_heads
        self.num_local_heads = num_local_heads
        self.local_window = local_window
        self.num_mosa_heads = num_mosa_heads
        self.sparsity = sparsity
        self.selection = selection
        self.load_feedback = load_feedback
        self.include_first_token = include_first_token
        self.hidden_act = hidden_act
        self.norm_type = norm_type
        self.norm_eps = norm_eps
        self.rotary_percent = rotary_percent
        self.rotary_base = rotary_base
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.attend_within_documents = attend_within_documents
        self.restart_rotary = restart_rotary
        self.selection_scope = selection_scope
        for name, allowed in (
            ("hidden_act", ("gelu", "silu")),
            ("norm_type", ("LayerNorm", "RMSNorm")),
            ("selection", ("expert_choice", "threshold")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; expected {', '.join(allowed)}")
        if num_dense_heads + num_local_heads + num_mosa_heads < 1:
            raise ValueError("num_dense_heads, num_local_heads and num_mosa_heads are all 0; set one of them above 0")
        if num_local_heads and local_window < 1:
            raise ValueError(f"local_window={local_window}; with local heads it must be at least 1")
        use_cache = kwargs.pop("use_cache", True)
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)
        self.use_cache = use_cache and self.can_decode  # by generate
        self.num_attention_heads = num_dense_heads + num_local_heads + num_mosa_heads

    @property
    def can_decode(self) -> bool:
        """Whether what the model does at a token depends on the tokens before it alone."""
        return not self.num_mosa_heads or self.selection == "threshold"

    def num_selected(self, length: int) -> int:
        """k, the tokens that expert choice selects of ``length``, and a threshold aims at."""
        return min(max(int(length / self.sparsity), 2), length)
