"""A MoSA language model (Mixture of Sparse Attention, arXiv 2505.00315) for transformers, in plain PyTorch.

Without MoSA heads, or with their ``selection`` "threshold" or "token_choice", the model is causal and decodes token by
token with a cache. With "expert_choice" a MoSA head selects the tokens with the largest scores in the sequence, so its
output at a token depends on later tokens, and so does that of a Routing head: such a model scores whole sequences, but
cannot decode.
"""

from __future__ import annotations

from contextlib import nullcontext
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

from .arguments_mosa import (
    TOKENIZERS,
    UNSUPPORTED,
    UNSUPPORTED_OPTIONS,
    check_inputs,
    check_others,
    did_you_mean,
    parameters,
    unsupported,
)
from .cache_mosa import CACHE, MosaCache, MosaCacheLayer, cache_entry, check_cache
from .configuration_mosa import MosaConfig
from .graph_mosa import can_capture, captured_step
from .heads_mosa import MosaAttention
from .room_mosa import Trial, may_read_twice
from .routing_mosa import MosaRoutingHeads
from .sparse_mosa import UNCALIBRATED, MosaHeads
from .tokens_mosa import Tokens, read_tokens

logger = logging.get_logger(__name__)

# Without cuDNN, which spends tens of milliseconds on every new shape: here each token brings one.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

IGNORED_LABEL = -100


def select_positions(states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Select positions of states [B, T, ...], as described in ``MosaForCausalLM.forward``."""
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:]  # 0: all
    positions = torch.as_tensor(logits_to_keep, device=states.device)
    if positions.dim() < 2:
        return states[:, positions]
    if positions.dtype == torch.bool:
        return states[positions]
    return states[torch.arange(len(states), device=states.device)[:, None], positions]


class MosaMLP(nn.Module):
    """A GELU MLP of two matrices, or a SwiGLU MLP of three."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        gated = config.hidden_act == "silu"
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False) if gated else None
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [B, T, h] to [B, T, h]."""
        up = self.up_proj(hidden_states)
        return self.down_proj(F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(hidden_states)) * up)


def norm(config: MosaConfig) -> nn.Module:
    """Create the model's kind of norm over the last dimension."""
    kind = nn.LayerNorm if config.norm_type == "LayerNorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class MosaDecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each with a preceding norm and a residual connection."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.input_layernorm = norm(config)
        self.self_attn = MosaAttention(config)
        self.post_attention_layernorm = norm(config)
        self.mlp = MosaMLP(config)

    def forward(self, hidden_states: Tensor, tokens: Tokens, cache: MosaCacheLayer | None = None) -> Tensor:
        """Map [B, T, h] to [B, T, h]."""
        # Gradient checkpointing repeats the layer outside of the model's own context, which takes 30 us to enter.
        with sdpa_kernel(BACKENDS) if self.gradient_checkpointing else nullcontext():
            hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), tokens, cache)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MosaPreTrainedModel(PreTrainedModel):
    """Base class of the models below."""

    config: MosaConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = MosaConfig
    base_model_prefix = "model"
    _no_split_modules = ["MosaDecoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["thresholds", "head_bias", "centroids"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch

    def __init__(self, config: MosaConfig, *inputs: Any, **kwargs: Any) -> None:
        config.check()
        super().__init__(config, *inputs, **kwargs)

    def new_cache(self) -> MosaCache:
        """Return an empty cache for this model, to be passed to consecutive calls.

        Raises:
            ValueError: the model is not causal.
        """
        if not self.config.can_decode:
            raise ValueError(
                f"use_cache must be False for {self.config.looking_ahead}: every token changes the selection, so there "
                "is nothing to cache; set use_cache=False, or use a causal model, such as one with "
                "selection='threshold'"
            )
        return MosaCache(self.config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MosaHeads):  # as in the paper's code
            heads, head_dim, width = module.proj_weight.shape
            nn.init.uniform_(module.router_weight, -(width**-0.5), width**-0.5)
            nn.init.uniform_(module.qkv_weight, -((3 * head_dim) ** -0.5), (3 * head_dim) ** -0.5)
            nn.init.uniform_(module.proj_weight, -((width * heads) ** -0.5), (width * heads) ** -0.5)
            if module.thresholds is not None:
                nn.init.constant_(module.thresholds, torch.nan)
            if module.head_bias is not None:
                nn.init.zeros_(module.head_bias)
        elif isinstance(module, MosaRoutingHeads):
            nn.init.normal_(module.qv_weight, std=self.config.initializer_range)
            nn.init.normal_(module.proj_weight, std=self.config.initializer_range)
            nn.init.normal_(module.centroids)
            module.centroids.copy_(F.normalize(module.centroids, dim=-1))
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
        """Return the last hidden states [B, T, h] for ids [B, T] or embeddings [B, T, h]; see ``MosaForCausalLM``."""
        check_others(MosaModel.forward, others, self.config)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        check_inputs(input_ids, inputs_embeds)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = self.new_cache()
        if cache is not None:
            check_cache(cache, self.config, hidden_states.shape[0])
        is_first = cache is None or cache.get_seq_length() == 0
        if is_first:
            self.check_thresholds()
        tokens = read_tokens(attention_mask, hidden_states, cache, self.config)
        can_guess = is_first and tokens.valid is None and may_read_twice()
        run = self.run_trial if can_guess else self.run_layers
        hidden_states, states = run(hidden_states, tokens, cache, bool(output_hidden_states))
        outputs = (*states[:-1], hidden_states) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, hidden_states=outputs, **cache_entry(cache))

    def run_layers(
        self, hidden_states: Tensor, tokens: Tokens, cache: MosaCache | None, keeps_all: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Run layers and norm on [B, T, h]; return the output, and if ``keeps_all`` the input and output of layers."""
        states = [hidden_states]
        with sdpa_kernel(BACKENDS):
            for number, layer in enumerate(self.layers):
                hidden_states = layer(hidden_states, tokens, None if cache is None else cache.layers[number])
                if keeps_all:
                    states.append(hidden_states)
        return self.norm(hidden_states), states

    def run_trial(
        self, hidden_states: Tensor, tokens: Tokens, cache: MosaCache | None, keeps_all: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Do the same as ``run_layers`` for the first tokens of sequences, where layers may guess (room_mosa.py)."""
        trial = Trial()
        result = self.run_layers(hidden_states, tokens._replace(trial=trial), cache, keeps_all)
        if trial.succeeded(*hidden_states.shape[:2]):
            return result
        del result, trial  # with the keys and values of this attempt
        for layer in [] if cache is None else cache.layers:
            layer.reset()
        return self.run_layers(hidden_states, tokens, cache, keeps_all)

    def check_thresholds(self) -> None:
        """Check that all thresholds are set. Layers that accelerate has offloaded check theirs once they are loaded.

        Raises:
            ValueError: some are not; the message names the layers.
        """
        layers = [heads for heads in self.modules() if isinstance(heads, MosaHeads)]
        known = [thresholds for heads in layers if (thresholds := heads.loaded_thresholds()) is not None]
        if not known or not bool(torch.cat([thresholds.to(known[0].device) for thresholds in known]).isnan().any()):
            return  # after a single wait for the device
        missing = [str(number) for number, heads in enumerate(layers) if heads.lacks_thresholds()]
        if missing:
            raise ValueError(UNCALIBRATED.format(f"layers {', '.join(missing)}"))


class MosaForCausalLM(MosaPreTrainedModel, GenerationMixin):
    """A MoSA language model with output embedding, loss and ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    captures_steps = True
    """Compute a token after others as a CUDA graph, where that is possible."""

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
        """Compute logits of sequences, each of which is one document, or of tokens that continue those in a cache.

        Args:
            input_ids: [B, T].
            attention_mask: [B, columns], including the tokens in the cache; 0 at padding, which may be anywhere. Such
                a token is ignored, and its logits are meaningless.
            past_key_values: the cache, from ``new_cache`` or an earlier call, which this call extends.
            cache: the same; its name depends on the version of transformers.
            inputs_embeds: [B, T, h], instead of ids.
            labels: [B, T], the same ids, or -100 for tokens to ignore: returns ``loss``, in nats per token, 0 if all
                are ignored.
            use_cache: create a cache if none is given; only for causal models.
            logits_to_keep: restrict logits and loss to the last so many positions (0: all), to indices, [n] for all
                sequences or [B, n] for each, or to a mask, bool [B, T], which gives logits [N, vocab_size].
            output_hidden_states: also return the output of every layer; None: as in the configuration.
            num_items_in_batch: divide the summed loss by this instead of the number of labels; if it is 0, the loss is
                0. transformers' Trainer passes it when it accumulates gradients.
            others: ``return_dict``: False returns a tuple. Other arguments of transformers' models are accepted if
                their value has no effect (None or False).

        Returns:
            ``logits`` [B, T, vocab_size] and the requested outputs.

        Raises:
            TypeError: an argument does not exist.
            ValueError: an argument is not supported, such as position_ids or output_attentions, or the input is empty.
        """
        check_others(MosaForCausalLM.forward, others, self.config)
        cache = past_key_values if cache is None else cache
        is_plain = inputs_embeds is None and labels is None and isinstance(logits_to_keep, int)
        is_plain = is_plain and not (output_hidden_states or self.config.output_hidden_states)
        if self.captures_steps and is_plain and can_capture(self, cache, input_ids):
            assert cache is not None and input_ids is not None
            check_cache(cache, self.config, len(input_ids))
            logits = captured_step(self, cache, input_ids, attention_mask)
            return CausalLMOutputWithPast(logits=logits, **cache_entry(cache))
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=False,  # overrides the configuration; a request was rejected above
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            following = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # [B, T]: the label of each prediction
            expected = select_positions(following, logits_to_keep).flatten().to(logits.device)
            loss = F.cross_entropy(logits.flatten(0, -2).float(), expected, reduction="sum")
            if num_items_in_batch is None:
                num_items_in_batch = (expected != IGNORED_LABEL).sum()
            count = torch.as_tensor(num_items_in_batch, device=loss.device)
            loss = loss / count.masked_fill(count == 0, 1)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **cache_entry(outputs.get(CACHE))
        )

    def generate(
        self, inputs: Tensor | None = None, *args: Any, causal_approximation: str | None = None, **kwargs: Any
    ) -> Any:
        """Generate as in transformers, with a ``MosaCache``.

        Args:
            inputs: [B, T]; prompts of different lengths are padded on the left.
            args, kwargs: see transformers. ``inputs_embeds`` [B, T, h] instead of ids is only for causal models, uses a
                cache even with use_cache=False, and returns only the new tokens.
            causal_approximation: required for models with expert choice or Routing heads, which are not causal.
                "prefix": compute every token from the whole prefix, from whose t tokens the heads select max(t /
                sparsity, 2) anew. This differs from the trained model, and is slow, because nothing is cached.

        Raises:
            ValueError: a model that is not causal, without an approximation; thresholds that are not calibrated; an
                empty prompt; a cache of another model; an option that this model does not support, such as drafts.
        """
        self._check_prompt(inputs, kwargs)
        self._check_options(args, kwargs)
        has_embeddings = kwargs.get("inputs_embeds") is not None
        if not self.config.can_decode:
            self._check_approximation(causal_approximation, has_embeddings)
            return super().generate(inputs, *args, **kwargs | {"use_cache": False})  # pyright: ignore
        if causal_approximation is not None:
            raise ValueError(f"causal_approximation must be None for a causal model, got {causal_approximation!r}")
        self.model.check_thresholds()
        cache, earlier_name = kwargs.pop("cache", None), kwargs.pop("past_key_values", None)
        cache = earlier_name if cache is None else cache
        # For embeddings, transformers itself sets use_cache=True: it reads them once, and ids afterwards.
        uses_cache = has_embeddings or self._generation_option("use_cache", args, kwargs) is not False
        if cache is not None or uses_cache:
            kwargs[CACHE] = self.new_cache() if cache is None else cache
        return super().generate(inputs, *args, **kwargs)  # pyright: ignore

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse ``generate_batch`` and what else transformers builds on this."""
        raise ValueError(
            "continuous batching is not supported: it pages keys and values, and heads that select tokens keep them in "
            "a MosaCache; pass the prompts to generate as one batch, padded on the left"
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Pass the cache as ``past_key_values``: without it, PEFT would prepend its virtual tokens at every step.

        transformers generates from embeddings only if this signature names ``inputs_embeds``.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in TOKENIZERS}
        kwargs["inputs_embeds"] = inputs_embeds
        prepared = super().prepare_inputs_for_generation(input_ids, **kwargs)  # pyright: ignore
        if CACHE in prepared:
            prepared["past_key_values"] = prepared.pop(CACHE)
        return prepared

    def _generation_option(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return an option of ``generate``: from its arguments, its generation configuration, or the model's."""
        given = args[0] if args else kwargs.get("generation_config")
        choices = (kwargs.get(name), getattr(given, name, None), getattr(self.generation_config, name, None))
        return next((choice for choice in choices if choice is not None), None)

    def _check_options(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, reason in UNSUPPORTED_OPTIONS.items():
            value = self._generation_option(name, args, kwargs)
            if value is not None and value is not False:
                option = f"{name}={value!r}" if isinstance(value, (str, int)) else name
                raise ValueError(f"{option} is not supported: {reason}; omit {name}")
        chunk = self._generation_option("prefill_chunk_size", args, kwargs)
        if chunk is not None and kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk} is not supported with inputs_embeds: transformers splits only ids; omit "
                "prefill_chunk_size"
            )

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Check arguments that are not options of ``generate``, as transformers does, and suggest similar names."""
        try:
            super()._validate_model_kwargs(model_kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        except ValueError as error:
            known = [*vars(GenerationConfig()), *parameters(MosaForCausalLM.forward), "causal_approximation"]
            unknown = [name for name, value in model_kwargs.items() if value is not None and name not in known]
            hints = [unsupported(name) if name in UNSUPPORTED else did_you_mean(name, known) for name in unknown]
            raise ValueError("; ".join([str(error), *filter(None, hints)])) from None

    def _check_prompt(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
        prompts = kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")  # embeddings are read in place of ids
        prompt = next((given for given in prompts if given is not None), None)
        mask = kwargs.get("attention_mask")
        if prompt is None or prompt.shape[1] == 0 or (mask is not None and not bool(mask.any(dim=1).all())):
            raise ValueError("a prompt is empty; pass at least one token in each, such as the end-of-text token")
        trained = self.config.max_position_embeddings
        if prompt.shape[1] > trained:
            logger.warning(f"the prompt has {prompt.shape[1]} tokens, but the model was trained on at most {trained}")

    def _check_approximation(self, approximation: str | None, has_embeddings: bool) -> None:
        if has_embeddings:
            raise ValueError(
                "cannot generate from inputs_embeds: transformers reads them once and then relies on a cache, but "
                f"{self.config.looking_ahead} select from the whole sequence, so nothing can be cached; pass input_ids "
                "with causal_approximation='prefix', or use a causal model, such as one with selection='threshold'"
            )
        if approximation is None:
            raise ValueError(
                f"cannot generate: {self.config.looking_ahead} select from the whole sequence, so no token can be "
                "decoded before the later ones are known; pass causal_approximation='prefix', which selects from the "
                "prefix anew for every token, or use a causal model, such as one with selection='threshold'"
            )
        if approximation != "prefix":
            raise ValueError(f"causal_approximation must be 'prefix', got {approximation!r}")
        logger.warning(
            "causal_approximation='prefix': heads select from the prefix anew for every token, unlike in training; "
            "nothing is cached, so every token costs a whole forward pass"
        )


# This table tells transformers' Trainer to shift labels by one position for label smoothing.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MosaConfig.model_type, MosaForCausalLM.__name__)

__all__ = ["MosaForCausalLM", "MosaModel", "MosaPreTrainedModel"]
