"""A MoSA language model (Mixture of Sparse Attention, arXiv 2505.00315) for transformers, in plain PyTorch.

With ``selection="threshold"``, or without MoSA heads, the model is causal: it decodes token by token, with a cache.
With ``selection="expert_choice"`` a MoSA head takes the tokens of the sequence with the largest scores, so what it does
at a token depends on the tokens after it: such a model scores whole sequences, and cannot decode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

from .cache_mosa import CACHE, MosaCache, MosaCacheLayer, check_cache, named
from .configuration_mosa import MosaConfig
from .heads_mosa import MosaAttention, MosaHeads
from .tokens_mosa import Tokens, read_tokens

logger = logging.get_logger(__name__)

# Not cuDNN's, which makes a plan for every new shape in tens of milliseconds: here each token brings a new one.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class MosaMLP(nn.Module):
    """Two matrices with GELU between them, or three with SwiGLU."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        gated = config.hidden_act == "silu"
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False) if gated else None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, h] to [B, T, h]."""
        up = self.up_proj(hidden_states)
        return self.down_proj(F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(hidden_states)) * up)


def norm(config: MosaConfig) -> nn.Module:
    """The model's kind of norm over the last dimension."""
    kind = nn.LayerNorm if config.norm_type == "LayerNorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class MosaDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = MosaAttention(config)
        self.post_attention_layernorm = norm(config)
        self.mlp = MosaMLP(config)

    def forward(self, hidden_states: Tensor, tokens: Tokens, cache: MosaCacheLayer | None = None) -> Tensor:
        """[B, T, h] to [B, T, h]."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), tokens, cache)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MosaPreTrainedModel(PreTrainedModel):
    """What the models below share."""

    config: MosaConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = MosaConfig
    base_model_prefix = "model"
    _no_split_modules = ["MosaDecoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["thresholds"]  # noqa: RUF012
    _supports_sdpa = True

    def new_cache(self) -> MosaCache:
        """An empty cache for this model, to be given to calls one after the other.

        Raises:
            ValueError: the model is not causal.
        """
        if not self.config.can_decode:
            raise ValueError(
                f"use_cache: num_mosa_heads={self.config.num_mosa_heads} with selection='expert_choice' choose again "
                "with every token, so there is nothing to keep; legal: use_cache=False, or a model with "
                "selection='threshold'"
            )
        return MosaCache(self.config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MosaHeads):  # as the authors do
            heads, head_dim, width = module.proj_weight.shape
            nn.init.uniform_(module.router_weight, -(width**-0.5), width**-0.5)
            nn.init.uniform_(module.qkv_weight, -((3 * head_dim) ** -0.5), (3 * head_dim) ** -0.5)
            nn.init.uniform_(module.proj_weight, -((width * heads) ** -0.5), (width * heads) ** -0.5)
            if module.thresholds is not None:
                nn.init.constant_(module.thresholds, torch.nan)
        else:
            super()._init_weights(module)


class MosaModel(MosaPreTrainedModel):
    """Embedding, layers and the final norm."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MosaDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = norm(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MosaCache | None = None,
        cache: MosaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """The last hidden states, [B, T, h], of ids [B, T] or embeddings [B, T, h]; see ``MosaForCausalLM``."""
        if others.get("position_ids") is not None:
            raise ValueError("position_ids is not supported: positions follow from attention_mask and the cache")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = self.new_cache()
        if cache is not None:
            check_cache(cache, self.config, hidden_states.shape[0])
        past = 0 if cache is None else cache.get_seq_length()
        if past == 0:
            self.check_thresholds()
        tokens = read_tokens(attention_mask, hidden_states, cache, self.config)
        states = [hidden_states]
        with sdpa_kernel(BACKENDS):
            for number, layer in enumerate(self.layers):
                hidden_states = layer(hidden_states, tokens, None if cache is None else cache.layers[number])
                if output_hidden_states:
                    states.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        everything = (*states[:-1], hidden_states) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, hidden_states=everything, **named(cache))

    def check_thresholds(self) -> None:
        """Refuse thresholds that nothing has set.

        Raises:
            ValueError: naming the layers.
        """
        if self.config.selection != "threshold" or not self.config.num_mosa_heads:
            return
        thresholds = [
            heads.thresholds for heads in self.modules() if isinstance(heads, MosaHeads)
        ]  # in order of layers
        missing = torch.stack(thresholds).isnan().any(dim=1).tolist()
        if any(missing):
            layers = ", ".join(str(number) for number, lacks in enumerate(missing) if lacks)
            raise ValueError(
                f"mosa_heads.thresholds of layers {layers} are NaN: they are not calibrated, so no head knows what to "
                "select; legal: numbers from 0 to 1; export what mosa checkpoint causalize writes, or a checkpoint of "
                "mosa.selection=threshold"
            )


class MosaForCausalLM(MosaPreTrainedModel, GenerationMixin):
    """A MoSA language model with its output embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MosaConfig) -> None:
        super().__init__(config)
        self.model = MosaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MosaCache | None = None,
        cache: MosaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of sequences, each one document, or of tokens that go on from what a cache holds.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T] with the tokens in the cache before them, 0 at padding, at either end or anywhere: a
                token with 0 is not there, and what the model says at it means nothing.
            past_key_values, cache: what ``new_cache`` gives, or an earlier call returned; one thing, whose name depends
                on the version of transformers. The call adds its tokens to it.
            inputs_embeds: [B, T, h], instead of ids.
            labels: [B, T], the ids themselves, -100 where they do not count: gives ``loss``, in nats per token.
            use_cache: begin a cache if none is given; of causal models.
            logits_to_keep: logits, and the loss, of that many last positions alone; 0: of all.
            output_hidden_states: return what every layer gives, too.
            num_items_in_batch: divisor of the summed loss instead of the number of labels that count here;
                transformers' Trainer gives it when it accumulates gradients, and adds up the losses.

        Returns:
            ``logits`` [B, T, vocab_size], and what was asked for.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **others,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            expected = labels[:, -logits_to_keep:][:, 1:].flatten()
            predicted = logits[:, :-1].flatten(0, 1).float()
            expected = expected.to(predicted.device)
            loss = F.cross_entropy(predicted, expected, reduction="mean" if num_items_in_batch is None else "sum")
            if num_items_in_batch is not None:
                loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **named(outputs.get(CACHE))
        )

    def generate(
        self, inputs: Tensor | None = None, *args: Any, causal_approximation: str | None = None, **kwargs: Any
    ) -> Any:
        """As transformers, with a ``MosaCache``.

        Args:
            inputs: [B, T]; prompts of several lengths are padded at the left.
            causal_approximation: of models with expert choice, which are not causal, "prefix": every token is computed
                from the whole prefix, in which the heads choose anew, max(t / sparsity, 2) of its t tokens. This is
                not the model that was trained, and slow: nothing is kept.

        Raises:
            ValueError: expert choice without an approximation; thresholds that are not calibrated; an empty prompt; a
                cache of another model.
        """
        self._check_prompt(inputs, kwargs)
        if not self.config.can_decode:
            self._check_approximation(causal_approximation)
            return super().generate(inputs, *args, **kwargs | {"use_cache": False})  # pyright: ignore
        if causal_approximation is not None:
            raise ValueError(f"causal_approximation={causal_approximation!r}: the model is causal; legal: None")
        self.model.check_thresholds()
        given = [
            cache for cache in (kwargs.pop("cache", None), kwargs.pop("past_key_values", None)) if cache is not None
        ]
        if given or self._wants_cache(args, kwargs):
            kwargs[CACHE] = given[0] if given else self.new_cache()
        return super().generate(inputs, *args, **kwargs)  # pyright: ignore

    def _wants_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = args[0] if args else kwargs.get("generation_config")
        choices = (kwargs.get("use_cache"), getattr(given, "use_cache", None), self.generation_config.use_cache)
        return next((choice for choice in choices if choice is not None), True)

    def _check_prompt(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
        prompt = next(
            (given for given in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if given is not None),
            None,
        )
        mask = kwargs.get("attention_mask")
        if prompt is None or prompt.shape[1] == 0 or (mask is not None and not bool(mask.any(dim=1).all())):
            raise ValueError("a prompt is empty; legal: one token or more in each, such as the end-of-text token")
        trained = self.config.max_position_embeddings
        if prompt.shape[1] > trained:
            logger.warning(f"the prompt has {prompt.shape[1]} tokens, the model was trained on {trained} at most")

    def _check_approximation(self, approximation: str | None) -> None:
        if approximation is None:
            raise ValueError(
                f"generate is refused: num_mosa_heads={self.config.num_mosa_heads} with selection='expert_choice' "
                "select with the whole sequence in view, so no token is decoded before the next are known; legal: "
                "generate(..., causal_approximation='prefix'), which selects in the prefix anew for every token, or a "
                "model with selection='threshold'"
            )
        if approximation != "prefix":
            raise ValueError(f"causal_approximation={approximation!r} is not known; legal: 'prefix'")
        logger.warning(
            "causal_approximation='prefix': heads select in the prefix anew for every token, which is not what the "
            "model was trained to do; nothing is kept, so a token costs a whole forward pass"
        )


__all__ = ["MosaForCausalLM", "MosaModel", "MosaPreTrainedModel"]
