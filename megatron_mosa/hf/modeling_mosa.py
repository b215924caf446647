"""A MoSA language model (Mixture of Sparse Attention, arXiv 2505.00315) for transformers, in plain PyTorch.

With ``selection="threshold"``, or without MoSA heads, the model is causal: it decodes token by token, with a cache.
With ``selection="expert_choice"`` a MoSA head takes the tokens of the sequence with the largest scores, so what it does
at a token depends on the tokens after it: such a model scores whole sequences, and cannot decode.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, logging

from .cache_mosa import CACHE, MosaCache, MosaCacheLayer, check_cache, named
from .configuration_mosa import MosaConfig
from .heads_mosa import UNCALIBRATED, MosaAttention, MosaHeads
from .tokens_mosa import Tokens, read_tokens

logger = logging.get_logger(__name__)

# Not cuDNN's, which makes a plan for every new shape in tens of milliseconds: here each token brings a new one.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

IGNORED_LABEL = -100
# What transformers and PEFT may pass along to any model, without a use here.
UNSUPPORTED = {
    "position_ids": "positions follow from attention_mask and the cache",
    "output_attentions": "the kernels keep no attention weights",
    "token_type_ids": "all tokens are of one kind",
}
HARMLESS = ("cache_position",)  # what the cache knows
NO_DRAFTS = "a MosaCache cannot take back the tokens of a draft"
# What generate of transformers offers, and this model does not.
NOT_GENERATED = {
    "cache_implementation": "heads that select tokens keep them in a MosaCache, which generate makes by itself",
    "assistant_model": NO_DRAFTS,
    "assistant_early_exit": NO_DRAFTS,
    "prompt_lookup_num_tokens": NO_DRAFTS,
    "use_mtp": NO_DRAFTS,
}


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that a method takes."""
    return [name for name in signature(function).parameters if name not in ("self", "others", "args", "kwargs")]


def did_you_mean(name: str, known: list[str]) -> str:
    """A question that names the argument most like one that does not exist; empty if none is."""
    similar = get_close_matches(name, known, n=1)
    return f"did you mean '{similar[0]}'?" if similar else ""


def asks(name: str, value: Any) -> bool:
    """Whether an argument that is not supported asks for anything."""
    if name == "token_type_ids" and isinstance(value, Tensor):
        return bool(value.any())
    return value is not None and value is not False


def refuse_others(forward: Callable[..., Any], others: dict[str, Any], config: MosaConfig) -> None:
    """Refuse arguments that ``forward`` does not name, rather than swallow a mistyped one.

    Raises:
        TypeError: no such argument.
        ValueError: one that transformers has, but not this model.
    """
    for name, reason in UNSUPPORTED.items():
        value = others.get(name)
        if asks(name, getattr(config, name, None) if value is None else value):
            raise ValueError(f"{name} is not supported: {reason}; leave {name} out")
    for name in others:
        if name not in UNSUPPORTED and name not in HARMLESS:
            names = [*parameters(forward), "return_dict"]
            hint = did_you_mean(name, names) or f"it takes {', '.join(names)}"
            raise TypeError(f"forward() got an unexpected keyword argument '{name}'; {hint}")


def kept(states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """[B, T, ...] at the positions to keep, as ``MosaForCausalLM.forward`` describes them."""
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:]  # all, for 0
    places = torch.as_tensor(logits_to_keep, device=states.device)
    if places.dim() < 2:
        return states[:, places]
    if places.dtype == torch.bool:
        return states[places]
    return states[torch.arange(len(states), device=states.device)[:, None], places]


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


class MosaDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = MosaAttention(config)
        self.post_attention_layernorm = norm(config)
        self.mlp = MosaMLP(config)

    def forward(self, hidden_states: Tensor, tokens: Tokens, cache: MosaCacheLayer | None = None) -> Tensor:
        """[B, T, h] to [B, T, h]."""
        # Gradient checkpointing repeats the layer where the model's own choice is over; entering it takes 30 us.
        with sdpa_kernel(BACKENDS) if self.gradient_checkpointing else nullcontext():
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
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch

    def new_cache(self) -> MosaCache:
        """An empty cache for this model, to be given to calls one after the other.

        Raises:
            ValueError: the model is not causal.
        """
        if not self.config.can_decode:
            raise ValueError(
                f"use_cache: num_mosa_heads={self.config.num_mosa_heads} with selection='expert_choice' choose again "
                "with every token, so there is nothing to keep; set use_cache=False, or a model with "
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

    @can_return_tuple
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
        refuse_others(MosaModel.forward, others, self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = self.new_cache()
        if cache is not None:
            check_cache(cache, self.config, hidden_states.shape[0])
        if cache is None or cache.get_seq_length() == 0:
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
        """Refuse thresholds that nothing has set. Those that accelerate keeps elsewhere their layer checks by itself.

        Raises:
            ValueError: naming the layers.
        """
        every = [heads for heads in self.modules() if isinstance(heads, MosaHeads)]  # in order of layers
        missing = [str(number) for number, heads in enumerate(every) if heads.lacks_thresholds()]
        if missing:
            raise ValueError(UNCALIBRATED.format(f"layers {', '.join(missing)}"))


class MosaForCausalLM(MosaPreTrainedModel, GenerationMixin):
    """A MoSA language model with its output embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MosaConfig) -> None:
        super().__init__(config)
        self.model = MosaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MosaCache | None = None,
        cache: MosaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
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
            labels: [B, T], the ids themselves, -100 where they do not count: gives ``loss``, in nats per token, 0
                where none counts.
            use_cache: begin a cache if none is given; of causal models.
            logits_to_keep: logits, and the loss, of these positions alone: the last so many, 0 being all; or indices,
                [n] for all sequences or [B, n] for each; or a mask, bool [B, T], which gives logits [N, vocab_size].
            output_hidden_states: return what every layer gives, too; by default the configuration says.
            num_items_in_batch: divisor of the summed loss instead of the number of labels that count here;
                transformers' Trainer gives it when it accumulates gradients, and adds up the losses. Where it is 0, so
                is the loss.
            others: ``return_dict``: False gives a tuple. What transformers may pass along without a use here is
                accepted where it asks for nothing (None or False).

        Returns:
            ``logits`` [B, T, vocab_size], and what was asked for.

        Raises:
            TypeError: an argument that does not exist.
            ValueError: one that cannot be had, such as position_ids or output_attentions.
        """
        refuse_others(MosaForCausalLM.forward, others, self.config)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=False,  # whatever the configuration says: if it was asked for, it was refused above
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(kept(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            following = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # [B, T]: of each position's prediction
            expected = kept(following, logits_to_keep).flatten().to(logits.device)
            loss = F.cross_entropy(logits.flatten(0, -2).float(), expected, reduction="sum")
            if num_items_in_batch is None:
                num_items_in_batch = (expected != IGNORED_LABEL).sum()
            count = torch.as_tensor(num_items_in_batch, device=loss.device)
            loss = loss / count.masked_fill(count == 0, 1)
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
                cache of another model; what transformers offers, but this model does not, such as drafts.
        """
        self._check_prompt(inputs, kwargs)
        self._check_options(args, kwargs)
        if not self.config.can_decode:
            self._check_approximation(causal_approximation)
            return super().generate(inputs, *args, **kwargs | {"use_cache": False})  # pyright: ignore
        if causal_approximation is not None:
            raise ValueError(f"causal_approximation={causal_approximation!r}: the model is causal; expected None")
        self.model.check_thresholds()
        given = [
            cache for cache in (kwargs.pop("cache", None), kwargs.pop("past_key_values", None)) if cache is not None
        ]
        if given or self._wants_cache(args, kwargs):
            kwargs[CACHE] = given[0] if given else self.new_cache()
        return super().generate(inputs, *args, **kwargs)  # pyright: ignore

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """As transformers, the cache under its earlier name: PEFT would put its virtual tokens before every token, not
        before the first alone, where it finds no ``past_key_values``."""
        given = super().prepare_inputs_for_generation(input_ids, **kwargs)  # pyright: ignore
        if CACHE in given:
            given["past_key_values"] = given.pop(CACHE)
        return given

    def _generation_option(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of ``generate`` says of an option: in its arguments, its configuration, or the model's."""
        given = args[0] if args else kwargs.get("generation_config")
        choices = (kwargs.get(name), getattr(given, name, None), getattr(self.generation_config, name, None))
        return next((choice for choice in choices if choice is not None), None)

    def _wants_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return self._generation_option("use_cache", args, kwargs) is not False

    def _check_options(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, reason in NOT_GENERATED.items():
            asked = self._generation_option(name, args, kwargs)
            if asked is not None and asked is not False:
                what = f"{name}={asked!r}" if isinstance(asked, (str, int)) else name
                raise ValueError(f"{what} is not supported: {reason}; leave {name} out")

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As transformers, which calls it with what no option of ``generate`` is named; says what a name resembles."""
        try:
            super()._validate_model_kwargs(model_kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        except ValueError as error:
            known = [*vars(GenerationConfig()), *parameters(MosaForCausalLM.forward), "causal_approximation"]
            hints = [did_you_mean(name, known) for name in model_kwargs if name not in known]
            raise ValueError("; ".join([str(error), *filter(None, hints)])) from None
        named_there = parameters(MosaForCausalLM.forward)
        others = {name: value for name, value in model_kwargs.items() if name not in named_there}
        refuse_others(MosaForCausalLM.forward, others, self.config)

    def _check_prompt(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
        prompt = next(
            (given for given in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if given is not None),
            None,
        )
        mask = kwargs.get("attention_mask")
        if prompt is None or prompt.shape[1] == 0 or (mask is not None and not bool(mask.any(dim=1).all())):
            raise ValueError("a prompt is empty; expected one token or more in each, such as the end-of-text token")
        trained = self.config.max_position_embeddings
        if prompt.shape[1] > trained:
            logger.warning(f"the prompt has {prompt.shape[1]} tokens, the model was trained on {trained} at most")

    def _check_approximation(self, approximation: str | None) -> None:
        if approximation is None:
            raise ValueError(
                f"generate is refused: num_mosa_heads={self.config.num_mosa_heads} with selection='expert_choice' "
                "select with the whole sequence in view, so no token is decoded before the next are known; expected "
                "generate(..., causal_approximation='prefix'), which selects in the prefix anew for every token, or a "
                "model with selection='threshold'"
            )
        if approximation != "prefix":
            raise ValueError(f"causal_approximation={approximation!r} is not known; expected 'prefix'")
        logger.warning(
            "causal_approximation='prefix': heads select in the prefix anew for every token, which is not what the "
            "model was trained to do; nothing is kept, so a token costs a whole forward pass"
        )


# By this table transformers' Trainer knows that with label smoothing, too, labels are those of the next position.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MosaConfig.model_type, MosaForCausalLM.__name__)

__all__ = ["MosaForCausalLM", "MosaModel", "MosaPreTrainedModel"]
