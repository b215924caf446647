"""Keys and values that decoding keeps: every token of dense heads, a window of local ones, MoSA heads' selected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_mosa import MosaConfig
from .rows_mosa import DenseRows, Rows, SelectedRows, WindowRows

# What transformers calls the cache, in arguments and outputs: "past_key_values" in earlier versions.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MosaCacheLayer(CacheLayerMixin):
    """What one layer keeps, by kind of heads; None: the model has none of the kind."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.length = 0  # columns of the input so far, padding included
        self.dense = DenseRows() if config.num_dense_heads else None
        self.local = WindowRows(config.local_window) if config.num_local_heads else None
        self.mosa = SelectedRows() if config.num_mosa_heads else None

    def parts(self) -> dict[str, Rows]:
        """By kind of heads."""
        every = {"dense": self.dense, "local": self.local, "mosa": self.mosa}
        return {kind: rows for kind, rows in every.items() if rows is not None}

    def get_seq_length(self) -> int:
        """Columns of the input so far, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask covers, and where they begin."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions of transformers

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        for name, rows in self.parts().items():
            setattr(self, name, WindowRows(rows.window) if isinstance(rows, WindowRows) else type(rows)())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue from other sequences of the batch, as beam search does."""
        for rows in self.parts().values():
            for tensor in rows.tensors()[:1]:
                rows.select(beam_idx.to(tensor.device))

    batch_select_indices = reorder_cache

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: a window does not remember what went before it."""
        raise ValueError("a MosaCache cannot be cropped; generate without drafts (assistant_model)")

    def lazy_initialization(self, *_: Any) -> None:
        """Nothing: buffers are made when there is something to keep."""

    def update(self, *_: Any, **__: Any) -> Any:
        """Heads write into their own part."""
        raise NotImplementedError("heads of a MoSA model write into the parts of a MosaCacheLayer")


class MosaCache(Cache):
    """What decoding keeps of the sequences of a batch, layer by layer; it grows as they do.

    Args:
        config: of the model that will fill it.
    """

    def __init__(self, config: MosaConfig) -> None:
        self.layers: list[MosaCacheLayer]
        super().__init__(layers=[MosaCacheLayer(config) for _ in range(config.num_hidden_layers)])  # pyright: ignore
        self.shape = cache_shape(config)
        self.batch: int | None = None  # sequences; None: nothing is in it
        self.in_inference_mode = False  # the last call was
        self.padded = False  # an attention mask came with what is in it

    def enter(self) -> None:
        """At the beginning of a call: what an earlier one left under torch.inference_mode becomes usable here."""
        inference = torch.is_inference_mode_enabled()
        if self.in_inference_mode and not inference:
            for layer in self.layers:
                for rows in layer.parts().values():
                    rows.leave_inference_mode()
        self.in_inference_mode = inference

    def bytes(self) -> dict[str, tuple[int, int]]:
        """Bytes allocated, and of them in use, by kind of heads, over all layers."""
        sums: dict[str, tuple[int, int]] = {}
        for layer in self.layers:
            for kind, rows in layer.parts().items():
                allocated, used = rows.bytes()
                before = sums.get(kind, (0, 0))
                sums[kind] = before[0] + allocated, before[1] + used
        return sums

    @property
    def max_cache_len(self) -> int:
        """No limit. PEFT's prefix tuning asks for it before the model refuses what it brings."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.batch, self.padded = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue from other sequences of the batch."""
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self.batch = len(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        super().batch_select_indices(indices)
        self.batch = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        if self.batch is not None:
            self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))


def cache_shape(config: MosaConfig) -> dict[str, int]:
    """What a cache must have in common with the model that reads it."""
    names = (
        "num_hidden_layers",
        "head_dim",
        "num_key_value_heads",
        "num_local_heads",
        "local_window",
        "num_mosa_heads",
    )
    return {name: getattr(config, name) for name in names}


def named(cache: MosaCache | None) -> dict[str, Any]:
    """The cache under its name in outputs and arguments, if there is one."""
    return {} if cache is None else {CACHE: cache}


def check_cache(cache: Any, config: MosaConfig, batch: int) -> None:
    """Refuse a cache that does not go with the model and the batch.

    Raises:
        ValueError: naming what differs.
    """
    if not isinstance(cache, MosaCache):
        raise ValueError(
            f"{CACHE} is a {type(cache).__name__}; expected what model.new_cache() gives (PEFT's prefix tuning "
            "gives keys and values, which heads that select tokens cannot take; use prompt tuning, IA3 or LoRA instead)"
        )
    if torch.is_grad_enabled():
        raise ValueError("a cache takes no gradients; call the model under torch.no_grad(), or with use_cache=False")
    for name, value in cache_shape(config).items():
        if cache.shape[name] != value:
            raise ValueError(f"{CACHE} is of another model: its {name}={cache.shape[name]}, this model's {value}")
    if cache.batch not in (None, batch):
        raise ValueError(f"{CACHE} holds {cache.batch} sequences, the input {batch}; expected as many")
    cache.batch = batch
    cache.enter()
