"""A MoSA language model (Mixture of Sparse Attention, arXiv 2505.00315) for transformers, in plain PyTorch.

The whole sequence is computed at once. A MoSA head takes the tokens of the sequence with the largest scores (expert
choice), so what it does at a token depends on the tokens after it: such a model cannot decode token by token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from .configuration_mosa import MosaConfig


def rotate(states: Tensor, positions: Tensor, config: MosaConfig) -> Tensor:
    """Rotate the leading channels of queries or keys [..., n, h'] by their positions [..., n] (half-split pairs)."""
    size = 2 * int(states.shape[-1] * config.rotary_percent / 2)
    if size == 0:
        return states
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=states.device) / size
    angles = positions.float().unsqueeze(-1) * config.rotary_base**-exponents  # [..., n, size / 2]
    cos, sin = angles.cos(), angles.sin()
    first, second = states[..., :size].float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(states.dtype), states[..., size:]), dim=-1)


class MosaCausalHeads(nn.Module):
    """Heads that see the tokens before; with a window only the last ``window``, the token itself included."""

    def __init__(self, config: MosaConfig, heads: int, groups: int, window: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.window = window
        self.q_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, groups * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, groups * config.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, h] to [B, T, h]."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, heads | groups, T, h']
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        query, key = rotate(query, positions, self.config), rotate(key, positions, self.config)
        repeats = query.shape[1] // key.shape[1]  # queries that share a key and a value
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        if self.window is None:
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            distance = positions[:, None] - positions[None]  # [T, T]
            visible = (distance >= 0) & (distance < self.window)
            attended = F.scaled_dot_product_attention(query, key, value, visible)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MosaHeads(nn.Module):
    """Heads that attend among the tokens that they select, gated by the router's score."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.config = config
        heads, width, head_dim = config.num_mosa_heads, config.hidden_size, config.head_dim
        self.router_weight = nn.Parameter(torch.empty(heads, width))  # [E, h]
        self.qkv_weight = nn.Parameter(torch.empty(heads, width, 3 * head_dim))  # [E, h, 3h'], columns q, k, v
        self.proj_weight = nn.Parameter(torch.empty(heads, head_dim, width))  # [E, h', h]

    def forward(self, hidden_states: Tensor, lengths: list[int] | None = None) -> Tensor:
        """[B, T, h] to [B, T, h], the sum over the heads; ``lengths``: tokens before the padding of each sequence."""
        batch, length, width = hidden_states.shape
        logits = torch.einsum("bth,eh->bet", hidden_states.float(), self.router_weight.float())
        scores = torch.sigmoid(logits)  # [B, E, T], fp32 whatever the type of the model
        indices = self.select(scores, lengths)  # [B, E, k], T in empty places
        sequence = torch.arange(batch, device=indices.device)[:, None, None]
        tokens = indices.clamp(max=length - 1)

        selected = hidden_states[sequence, tokens]  # [B, E, k, h]
        query, key, value = torch.einsum("bekh,ehd->bekd", selected, self.qkv_weight).chunk(3, dim=-1)
        query, key = rotate(query, indices, self.config), rotate(key, indices, self.config)  # [B, E, k, h']
        logits = torch.einsum("bend,bemd->benm", query, key).float() * query.shape[-1] ** -0.5  # [B, E, k, k]
        visible = indices.unsqueeze(-1) >= indices.unsqueeze(-2)  # query position >= key position
        weights = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1).to(value.dtype)
        attended = torch.einsum("benm,bemd->bend", weights, value)  # [B, E, k, h']

        gate = scores.gather(-1, tokens).masked_fill(indices == length, 0)  # [B, E, k]
        gated = (attended.float() * gate.unsqueeze(-1)).to(attended.dtype)
        projected = torch.einsum("bekd,edh->bekh", gated, self.proj_weight)  # [B, E, k, h]
        output = torch.zeros(batch * length, width, dtype=torch.float32, device=hidden_states.device)
        output.index_add_(0, (sequence * length + tokens).flatten(), projected.float().flatten(0, 2))
        return output.view(batch, length, width).to(hidden_states.dtype)

    def select(self, scores: Tensor, lengths: list[int] | None) -> Tensor:
        """The positions of each head's largest scores [B, E, T], ties to the earlier token, in position order.

        A sequence with padding selects as many tokens as it would alone, and none of the padding.
        """
        length = scores.shape[-1]
        keys = scores.clone()
        if self.config.include_first_token:
            keys[..., 0] = torch.inf
        if lengths is None:
            ranked = torch.sort(keys, dim=-1, descending=True, stable=True).indices
            return ranked[..., : self.config.num_selected(length)].sort(dim=-1).values
        device = scores.device
        padding = torch.arange(length, device=device) >= torch.tensor(lengths, device=device)[:, None]  # [B, T]
        keys = keys.masked_fill(padding[:, None], -torch.inf)
        quotas = [self.config.num_selected(count) for count in lengths]
        ranked = torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., : max(quotas)]
        left_out = torch.arange(max(quotas), device=device) >= torch.tensor(quotas, device=device)[:, None]  # [B, k]
        return ranked.masked_fill(left_out[:, None], length).sort(dim=-1).values


class MosaAttention(nn.Module):
    """The sum of a layer's dense, local and MoSA heads."""

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        dense, local = config.num_dense_heads, config.num_local_heads
        self.dense_heads = MosaCausalHeads(config, dense, config.num_key_value_heads) if dense else None
        self.local_heads = MosaCausalHeads(config, local, local, config.local_window) if local else None
        self.mosa_heads = MosaHeads(config) if config.num_mosa_heads else None

    def forward(self, hidden_states: Tensor, lengths: list[int] | None) -> Tensor:
        """[B, T, h] to [B, T, h]."""
        parts = [heads(hidden_states) for heads in (self.dense_heads, self.local_heads) if heads is not None]
        if self.mosa_heads is not None:
            parts.append(self.mosa_heads(hidden_states, lengths))
        output = parts[0]
        for part in parts[1:]:
            output = output + part
        return output


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

    def forward(self, hidden_states: Tensor, lengths: list[int] | None) -> Tensor:
        """[B, T, h] to [B, T, h]."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), lengths)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MosaPreTrainedModel(PreTrainedModel):
    """What the models below share."""

    config_class = MosaConfig
    base_model_prefix = "model"
    _no_split_modules = ["MosaDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MosaHeads):  # as the authors do
            heads, head_dim, width = module.proj_weight.shape
            nn.init.uniform_(module.router_weight, -(width**-0.5), width**-0.5)
            nn.init.uniform_(module.qkv_weight, -((3 * head_dim) ** -0.5), (3 * head_dim) ** -0.5)
            nn.init.uniform_(module.proj_weight, -((width * heads) ** -0.5), (width * heads) ** -0.5)
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
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> BaseModelOutput:
        """The last hidden states, [B, T, h], of ids [B, T] or embeddings [B, T, h]; see ``MosaForCausalLM``."""
        for name in ("position_ids", "past_key_values", "cache"):
            if others.get(name) is not None:
                raise ValueError(f"{name} is not supported: the whole sequence is computed, from position 0")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        lengths = unpadded_lengths(attention_mask, hidden_states)
        states = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states, lengths)
            states.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        everything = (*states[:-1], hidden_states) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=everything)


def unpadded_lengths(attention_mask: Tensor | None, hidden_states: Tensor) -> list[int] | None:
    """Tokens before the padding of each sequence; None: there is none.

    Raises:
        ValueError: the mask is anything but ones and then zeros in every row, with a one at first.
    """
    if attention_mask is None or (bool((attention_mask == 1).all()) and attention_mask.dim() == 2):
        return None
    batch, length, _ = hidden_states.shape
    if attention_mask.shape != (batch, length):
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; legal: {(batch, length)}")
    mask = attention_mask.to(torch.bool)
    counts = mask.sum(dim=1)
    if not torch.equal(mask, torch.arange(length, device=mask.device) < counts[:, None]) or not bool(counts.all()):
        raise ValueError(
            "attention_mask must be ones and then zeros in every row: padding belongs at the end of a sequence; set "
            "tokenizer.padding_side = 'right'"
        )
    return counts.tolist()


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
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """Logits of whole sequences, each one document.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 at padding, which must be at the end; it changes nothing at other tokens.
            inputs_embeds: [B, T, h], instead of ids.
            labels: [B, T], the ids themselves, -100 where they do not count: gives ``loss``, in nats per token.
            logits_to_keep: logits, and the loss, of that many last positions alone; 0: of all.
            output_hidden_states: return what every layer gives, too.

        Returns:
            ``logits`` [B, T, vocab_size], and what was asked for.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            **others,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            expected = labels[:, -logits_to_keep:][:, 1:].flatten()
            predicted = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(predicted, expected.to(predicted.device), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers; the whole sequence is computed for every new token.

        Raises:
            NotImplementedError: the model has MoSA heads.
        """
        if self.config.num_mosa_heads:
            raise NotImplementedError(
                f"generate is not offered: num_mosa_heads={self.config.num_mosa_heads}, and expert choice selects with "
                "the whole sequence in view, so no token can be decoded before those after it are known; legal: models "
                "without MoSA heads, or calling the model on whole sequences"
            )
        return super().generate(*args, **kwargs | {"use_cache": False})  # pyright: ignore


__all__ = ["MosaForCausalLM", "MosaModel", "MosaPreTrainedModel"]
