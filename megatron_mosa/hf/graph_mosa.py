"""Compute one token of every sequence as one CUDA graph, which the host launches in the time of a single kernel.

A graph has fixed shapes and addresses. So lengths and positions are counted on the device, room in the cache is made
for some steps at a time, and when a buffer of the cache has moved, as it grew or sequences were exchanged, the next
step but one is captured anew.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .cache_mosa import MosaCache
from .kernels_mosa import can_run_kernels
from .rows_mosa import DenseRows
from .tokens_mosa import Column, Tokens, check_mask, rotary_tables

STRETCH = 16  # steps for which MoSA heads have room for certain: each of them then needs one more block at most
AHEAD = (
    128  # steps for which there is probably room when buffers have grown, since capturing takes as long as many steps
)


class CapturedSteps:
    """Takes steps with one cache; each call is one step.

    Args:
        model: a ``MosaForCausalLM`` that ``can_capture``.
        cache: is not empty; every call must give the same.
    """

    def __init__(self, model: Any, cache: MosaCache) -> None:
        device, batch = model.device, cache.batch
        assert batch is not None
        self.model = model
        self.captures = device.type == "cuda"
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(batch if cache.padded else 1, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # of the input, including padding
        self.is_valid = torch.ones(batch, 1, dtype=torch.bool, device=device) if cache.padded else None
        self.valid: Tensor | None = None  # bool [B, columns of the dense rows]; None: no padding, or no such heads
        self.columns = -1  # that ``column`` stands at
        self.left = 0  # steps until MoSA heads need room
        self.key: tuple[tuple[int, ...], ...] = ()  # addresses and shapes
        self.runs = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def fits(self, model: Any, cache: MosaCache) -> bool:
        """Return whether this can take the next step with such a model and cache."""
        is_frozen = self.ids.is_inference() and not torch.is_inference_mode_enabled()
        is_same = self.model is model and self.ids.device == model.device and len(self.ids) == cache.batch
        return is_same and not is_frozen and (self.is_valid is not None) == cache.padded

    def __call__(self, cache: MosaCache, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return logits [B, 1, vocab_size] of ids [B, 1], and add the tokens to the cache.

        Args:
            attention_mask: [B, columns], including the token; None if ``cache.padded`` is False.
        """
        length = cache.get_seq_length()
        if length != self.columns or self.key != self._key(cache):  # others have changed the cache
            self.left = 0
        self._make_room(cache, length)
        self.ids.copy_(input_ids)
        if length != self.columns:
            self.column.fill_(length)
        if cache.padded:
            assert attention_mask is not None and self.is_valid is not None
            mask = attention_mask.to(self.ids.device, torch.bool)
            self.positions.copy_(mask.sum(dim=1, keepdim=True).sub_(1).clamp_(min=0))
            self.is_valid.copy_(mask[:, -1:])
            if self.valid is not None:
                self.valid[:, : length + 1].copy_(mask)
                self.valid[:, length] = True  # padding attends to itself
        elif length != self.columns:
            self.positions.fill_(length)
        logits = self._run(cache)
        for layer in cache.layers:
            layer.length += 1
            if isinstance(rows := layer.parts().get("dense"), DenseRows):
                rows.length += 1
            if layer.mosa is not None:
                layer.mosa.is_ahead = True
        self.columns, self.left = length + 1, self.left - 1
        return logits

    def _make_room(self, cache: MosaCache, length: int) -> None:
        size, dtype = self.model.config.head_dim, self.model.dtype
        for layer in cache.layers:
            for rows in layer.parts().values():
                if isinstance(rows, DenseRows) and rows.keys is not None:
                    if length >= rows.rows:
                        rows.reserve(rows.keys, length + AHEAD)
                    if cache.padded and (self.valid is None or self.valid.shape[1] != rows.keys.shape[2]):
                        shape = (len(self.ids), rows.keys.shape[2])
                        self.valid = torch.zeros(shape, dtype=torch.bool, device=self.ids.device)
        if self.left <= 0:
            selected = [layer.mosa for layer in cache.layers if layer.mosa is not None]
            has_room = [rows.has_room(STRETCH) for rows in selected]
            for rows in [] if all(has_room) else selected:  # all layers, so that not each has its own new capture
                rows.reserve_ahead(self.ids.new_empty(0, size, dtype=dtype), AHEAD, 2 / self.model.config.sparsity)
            self.left = STRETCH

    def _key(self, cache: MosaCache) -> tuple[tuple[int, ...], ...]:
        """Return addresses and shapes of all that the step reads or writes and that may be replaced."""
        parts = [rows for layer in cache.layers for rows in layer.parts().values()]
        used = [tensor for rows in parts for tensor in rows.buffers()]
        used += [self.model.lm_head.weight]  # which moves with all others when a model is moved or converted
        used += [] if self.valid is None else [self.valid]
        return tuple((tensor.data_ptr(), *tensor.shape) for tensor in used)

    def _run(self, cache: MosaCache) -> Tensor:
        if (key := self._key(cache)) != self.key:
            self.key, self.runs, self.graph = key, 0, None
        self.runs += 1
        if not self.captures or self.runs == 1:  # compiles kernels, which a capture does not allow
            return self._step(cache)
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
                self.logits = self._step(cache)
            self.graph = graph
        self.graph.replay()
        assert self.logits is not None
        return self.logits.clone()  # the next step writes there

    def _step(self, cache: MosaCache) -> Tensor:
        """Compute the step; reads and counts nothing on the host."""
        model = self.model.model
        tokens = Tokens(self.positions, rotary_tables(self.positions, model.config), self.is_valid)
        column = Column(self.column, self.column + 1, self.valid)
        states = model.embed_tokens(self.ids)
        for layer, stored in zip(model.layers, cache.layers, strict=True):
            attention = layer.self_attn
            states = states + attention.step(layer.input_layernorm(states), tokens, stored, column)
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        self.positions += 1
        self.column += 1
        return self.model.lm_head(model.norm(states))


_STEPS: WeakKeyDictionary[MosaCache, CapturedSteps] = WeakKeyDictionary()


def captured_step(model: Any, cache: MosaCache, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Take a step for which ``can_capture`` is True: return logits [B, 1, vocab_size], and extend the cache.

    Raises:
        ValueError: the mask has another shape, or is missing although the cache began with one.
    """
    check_mask(attention_mask, len(input_ids), cache.get_seq_length() + 1, cache.padded)
    cache.padded |= attention_mask is not None  # what it holds is not inspected, which would wait for the device
    steps = _STEPS.get(cache)
    if steps is None or not steps.fits(model, cache):
        steps = _STEPS[cache] = CapturedSteps(model, cache)
    return steps(cache, input_ids, attention_mask)


def can_capture(model: Any, cache: MosaCache | None, input_ids: Tensor | None) -> bool:
    """Return whether a call is a step that can be captured: one token of each sequence, after others, on one device.

    Fixed heads and token choice cannot be, because the host must know how many tokens they take.
    """
    config = model.config
    return (
        cache is not None
        and input_ids is not None
        and input_ids.shape[1] == 1
        and cache.get_seq_length() > 0
        and cache.batch == len(input_ids)
        and not config.num_fixed_heads
        and not (config.num_mosa_heads and config.selection != "threshold")
        and getattr(model, "hf_device_map", None) is None
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(input_ids.device.type)
        and all(rows.keys is not None and rows.keys.dtype == model.dtype for rows in cache.layers[0].parts().values())
        and can_run_kernels(model.lm_head.weight)
    )
