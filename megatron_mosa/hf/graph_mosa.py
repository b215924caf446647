"""Compute one token of every sequence as one CUDA graph, which the host launches in the time of a single kernel.

A graph has fixed shapes and addresses. So lengths and positions are counted on the device, room in the cache is made
for some steps at a time, and when a buffer of the cache has moved, as it grew or sequences were exchanged, the next
step but one is captured anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .cache_mosa import MosaCache
from .kernels_mosa import can_run_kernels
from .rows_mosa import BLOCK, DenseRows, Rows, SelectedRows
from .tokens_mosa import Column, Tokens, check_mask, rotary_tables

STRETCH = 12  # steps for which MoSA heads have room for certain
EARLY = 4  # steps before the end of a stretch at which the host asks for its outcome, so that it need not wait for it
assert STRETCH + EARLY <= BLOCK  # each head then needs one more block at most
# Steps for which there is probably room when buffers have grown, since capturing takes as long as many steps.
AHEAD = 128


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Return the stream on which graphs are captured, and the one of their branches."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Branch:
    """A context in which kernels launched within ``beside`` run beside the others, if a CUDA graph is being captured.

    What follows the context waits for both. Outside of a graph there is one stream: memory that one stream frees could
    be in use in another. In a graph what ``beside`` reads must live until the context ends.

    Args:
        device: of the kernels.
        programs: of the others at a time, at least. Where they fill the GPU nothing runs beside them: both would only
            take longer.
    """

    def __init__(self, device: torch.device, programs: int = 0) -> None:
        self.device = device
        self.programs = programs
        self.stream: torch.cuda.Stream | None = None  # that what follows has to wait for

    def __enter__(self) -> Branch:
        return self

    @contextmanager
    def beside(self) -> Iterator[None]:
        if not self._can_run_beside():
            yield
            return
        self.stream = _streams(self.device)[1]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # which makes it part of the graph
        with torch.cuda.stream(self.stream):
            yield

    def _can_run_beside(self) -> bool:
        if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return False
        return self.programs <= torch.cuda.get_device_properties(self.device).multi_processor_count

    def __exit__(self, *error: Any) -> None:
        if self.stream is not None:  # after an error, too: a capture cannot end before its streams are joined
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            self.stream = None


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
        self.totals: tuple[Tensor, torch.cuda.Event | None] | None = None  # a copy on the host, and its completion
        self.key: tuple[int, ...] = ()  # what the graph was captured with
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
        parts = [rows for layer in cache.layers for rows in layer.parts().values()]
        if length != self.columns:
            self.column.fill_(length)
        if length != self.columns or self.key != self._key(parts):  # others have changed the cache
            self.left, self.totals = 0, None
        self._make_room(parts, length, cache.padded)
        self.ids.copy_(input_ids)
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
        logits = self._run(cache, self._key(parts))
        for layer in cache.layers:
            layer.length += 1
        for rows in parts:
            if isinstance(rows, DenseRows):
                rows.length += 1
            elif isinstance(rows, SelectedRows):
                rows.is_ahead = True
        self.columns, self.left = length + 1, self.left - 1
        return logits

    def _key(self, parts: list[Rows]) -> tuple[int, ...]:
        """Return numbers that change when a tensor that the step reads or writes is replaced by another."""
        valid = () if self.valid is None else (self.valid.data_ptr(), self.valid.shape[1])
        moved = self.model.lm_head.weight.data_ptr()  # together with all others, when a model is moved or converted
        return moved, *valid, *(rows.changes for rows in parts)

    def _make_room(self, parts: list[Rows], length: int, is_padded: bool) -> None:
        for rows in parts:
            if isinstance(rows, DenseRows) and rows.keys is not None:
                if length >= rows.rows:
                    rows.reserve(rows.keys, length + AHEAD)
                if is_padded and (self.valid is None or self.valid.shape[1] != rows.keys.shape[2]):
                    shape = (len(self.ids), rows.keys.shape[2])
                    self.valid = torch.zeros(shape, dtype=torch.bool, device=self.ids.device)
        selected = [rows for rows in parts if isinstance(rows, SelectedRows)]
        if selected and self.left in (EARLY, 0):
            self._make_room_for_selected(selected)

    def _make_room_for_selected(self, selected: list[SelectedRows]) -> None:
        if self.left == EARLY or self.totals is None:
            totals, event = torch.stack([rows.totals for rows in selected if rows.totals is not None]), None
            if totals.is_cuda:
                copy = torch.empty(totals.shape, dtype=totals.dtype, device="cpu", pin_memory=True)
                totals, event = copy.copy_(totals, non_blocking=True), torch.cuda.Event()
                event.record(torch.cuda.current_stream(self.ids.device))
            self.totals = totals, event
        if self.left == 0:
            totals, event = self.totals
            if event is not None:
                event.synchronize()
            known = zip(selected, totals.tolist(), strict=True)
            has_room = [rows.has_room(counted, STRETCH + EARLY) for rows, counted in known]
            like = self.model.lm_head.weight.new_empty(0, self.model.config.head_dim)
            for rows in [] if all(has_room) else selected:  # all layers, so that not each has its own new capture
                rows.reserve_ahead(like, AHEAD, 2 / self.model.config.sparsity)
            self.left, self.totals = STRETCH, None

    def _run(self, cache: MosaCache, key: tuple[int, ...]) -> Tensor:
        if key != self.key:
            self.key, self.runs, self.graph = key, 0, None
        self.runs += 1
        if not self.captures or self.runs == 1:  # compiles kernels, which a capture does not allow
            return self._step(cache)
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            stream = _streams(self.ids.device)[0]  # the default one is that of the current device
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # others may use the device
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
            states = attention.step(layer.input_layernorm(states), states, tokens, stored, column)
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
    """Return whether a call is a step that can be captured: one token of each sequence, after others, on one device."""
    return (
        cache is not None
        and input_ids is not None
        and input_ids.shape[1] == 1
        and cache.get_seq_length() > 0
        and cache.batch == len(input_ids)
        and getattr(model, "hf_device_map", None) is None
        and all(layer.self_attn.can_step() for layer in model.model.layers)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(input_ids.device.type)
        and all(rows.keys is not None and rows.keys.dtype == model.dtype for rows in cache.layers[0].parts().values())
        and can_run_kernels(model.lm_head.weight)
    )
