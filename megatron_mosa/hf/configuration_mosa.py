"""Configuration of a MoSA language model (Mixture of Sparse Attention, arXiv 2505.00315) for transformers."""

from __future__ import annotations

import math
import operator
from typing import Any

from transformers import PretrainedConfig

CHOICES = {
    "hidden_act": ("gelu", "silu"),
    "norm_type": ("LayerNorm", "RMSNorm"),
    "selection": ("expert_choice", "threshold", "token_choice"),
    "selection_scope": ("sequence", "document"),
}
FLAGS = ("include_first_token", "attend_within_documents", "restart_rotary", "attention_gate", "tie_word_embeddings")
FEWEST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 1,
    "head_dim": 1,
    "num_dense_heads": 0,
    "num_key_value_heads": 0,
    "num_local_heads": 0,
    "local_window": 0,
    "num_fixed_heads": 0,
    "fixed_stride": 0,
    "num_routing_heads": 0,
    "routing_clusters": 0,
    "num_mosa_heads": 0,
    "max_position_embeddings": 1,
}
# The bounds of training (config/schema.py), so that a model that works here can also be imported.
BOUNDS = {
    "sparsity": {"at least": 1, "at most": 2**24},
    "load_feedback": {"at least": 0, "at most": 1000},
    "norm_eps": {"greater than": 0, "at most": 1000},
    "rotary_percent": {"at least": 0, "at most": 1},
    "rotary_base": {"greater than": 0, "at most": 10**12},
    "initializer_range": {"greater than": 0, "at most": 1000},
}
HEADS = ("num_dense_heads", "num_local_heads", "num_fixed_heads", "num_routing_heads", "num_mosa_heads")
COMPARISONS = {"at least": operator.ge, "greater than": operator.gt, "at most": operator.le}  # each False for NaN


class MosaConfig(PretrainedConfig):
    """Configuration of a MoSA language model.

    Every layer sums dense heads (all previous tokens), local heads (a sliding window), fixed heads (every so many
    tokens), Routing heads (within clusters of similar tokens) and MoSA heads (each among the tokens that it selects).
    There may be 0 heads of a kind.

    Args:
        vocab_size: rows of the embedding, including padding.
        hidden_size: h, the width of the residual stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of layers.
        head_dim: h', the width of every head.
        num_dense_heads: number of dense heads.
        num_key_value_heads: number of key and value heads that the dense heads share in groups; None: one each.
        num_local_heads: number of sliding-window heads.
        local_window: number of tokens that a local head sees, including the token itself.
        num_fixed_heads: number of fixed heads.
        fixed_stride: fixed heads attend among the tokens whose position is a multiple of this.
        num_routing_heads: number of heads of the Routing Transformer, which are not causal.
        routing_clusters: each of so many centroids of a Routing head takes max(T / this, 2) of the T tokens of a
            sequence, and these attend to each other.
        attention_gate: whether the outputs of dense and local heads are multiplied by a sigmoid of the token's state.
        num_mosa_heads: E, the number of MoSA heads.
        sparsity: each MoSA head selects k = max(floor(T / sparsity), 2) of the T tokens of a sequence, or about as many
            by its threshold.
        selection: "expert_choice": the k tokens with the largest scores, which is not causal. "threshold": the first
            token and every token whose score is above the head's own threshold. "token_choice": the first token, and
            every token that has the head among its round(num_mosa_heads / sparsity) heads of the largest scores.
        load_feedback: with "threshold", how far a head's threshold rises, in logits, for each token that it has
            selected in excess of 1 / sparsity of the tokens so far (and falls for each missing one).
        include_first_token: whether expert choice always selects token 0.
        hidden_act: "gelu" (two matrices) or "silu" (three: SwiGLU).
        norm_type: "LayerNorm" (with bias) or "RMSNorm".
        norm_eps: the norm's epsilon.
        rotary_percent: share of a head's channels that is rotated.
        rotary_base: base of the rotary frequencies.
        max_position_embeddings: sequence length in training; longer sequences are possible.
        initializer_range: standard deviation of new weights outside of MoSA heads.
        tie_word_embeddings: whether input and output embedding are the same.
        attend_within_documents: whether attention in training stayed within the documents of a packed sequence. Like
            the next two, it is recorded for further training and has no effect here, where a sequence is one document.
        restart_rotary: whether positions in training restarted with each document.
        selection_scope: what MoSA heads selected among in training, "sequence" or "document".

    Raises:
        ValueError: a value is not allowed.
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
        num_fixed_heads: int = 0,
        fixed_stride: int = 0,
        attention_gate: bool = False,
        num_routing_heads: int = 0,
        routing_clusters: int = 0,
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
        self.num_fixed_heads = num_fixed_heads
        self.fixed_stride = fixed_stride
        self.attention_gate = attention_gate
        self.num_routing_heads = num_routing_heads
        self.routing_clusters = routing_clusters
        use_cache = kwargs.pop("use_cache", True)
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)
        self.check()
        self.use_cache = use_cache and self.can_decode  # the default of generate
        self.num_attention_heads = sum(getattr(self, name) for name in HEADS)

    def check(self) -> None:
        """Check all values; a model does, too, because ``from_pretrained(folder, name=value)`` changes them later.

        Raises:
            ValueError: names the first value that is not allowed.
        """
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, fewest in FEWEST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < fewest:
                raise ValueError(f"{name} must be an integer of at least {fewest}, got {value!r}")
        for name, bounds in BOUNDS.items():
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and value != math.inf
            if not is_number or not all(COMPARISONS[word](value, bound) for word, bound in bounds.items()):
                words = " and ".join(f"{word} {bound}" for word, bound in bounds.items())
                raise ValueError(f"{name} must be {'finite' if value == math.inf else words}, got {value!r}")
        self._check_heads()

    def _check_heads(self) -> None:
        if not any(getattr(self, name) for name in HEADS):
            raise ValueError(f"{', '.join(HEADS[:-1])} and {HEADS[-1]} are all 0; set one of them above 0")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because rotary embedding rotates pairs, got {self.head_dim}")
        dense, groups = self.num_dense_heads, self.num_key_value_heads
        if dense and (not groups or dense % groups):
            raise ValueError(f"num_key_value_heads must divide num_dense_heads={dense}, got {groups}")
        if self.num_local_heads and not self.local_window:
            raise ValueError("local_window must be at least 1 with local heads, got 0")
        if self.num_fixed_heads and not self.fixed_stride:
            raise ValueError("fixed_stride must be at least 1 with fixed heads, got 0")
        if self.num_routing_heads and self.routing_clusters < 2:
            raise ValueError(f"routing_clusters must be at least 2 with Routing heads, got {self.routing_clusters}")
        if self.selection == "token_choice" and self.num_mosa_heads and not self.heads_per_token:
            raise ValueError(
                f"sparsity={self.sparsity:g} leaves each token round(num_mosa_heads / sparsity) = 0 of "
                f"num_mosa_heads={self.num_mosa_heads} heads to choose; set sparsity below {2 * self.num_mosa_heads}"
            )

    @property
    def can_decode(self) -> bool:
        """Whether the model is causal: its output at a token depends only on the token and those before it."""
        return not self.num_routing_heads and (not self.num_mosa_heads or self.selection != "expert_choice")

    @property
    def looking_ahead(self) -> str:
        """The arguments because of which the model is not causal, for messages."""
        routing = f"num_routing_heads={self.num_routing_heads}"
        mosa = f"num_mosa_heads={self.num_mosa_heads} with selection='expert_choice'"
        chosen = self.num_mosa_heads and self.selection == "expert_choice"
        return " and ".join([routing] * bool(self.num_routing_heads) + [mosa] * bool(chosen))

    @property
    def heads_per_token(self) -> int:
        """How many heads a token takes with token choice."""
        return round(self.num_mosa_heads / self.sparsity)

    def num_selected(self, length: int) -> int:
        """Return k, the number of ``length`` tokens that expert choice selects, and a threshold on average."""
        return min(max(int(length / self.sparsity), 2), length)

    def num_clustered(self, length: int) -> int:
        """Return how many of ``length`` tokens a centroid of a Routing head takes."""
        return min(max(length // self.routing_clusters, 2), length)
