"""The key-value cache, of each kind of heads: all tokens, a window, or the tokens that the heads attend among."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_mosa import MosaConfig
from .rows_mosa import DenseRows, FixedRows, Rows, SelectedRows, WindowRows

# The name of the cache in arguments and outputs of transformers: "past_key_values" in earlier versions.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

# What stores the keys and values of each kind of heads.
ROWS: dict[str, Callable[[MosaConfig], Rows]] = {
    "dense": lambda _: DenseRows(),
    "local": lambda config: WindowRows(config.local_window),
    "fixed": lambda _: FixedRows(),
    "routing": lambda _: Rows(),  # stays empty: models with such heads have no cache
    "mosa": lambda _: SelectedRows(),
}


class MosaCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, by kind of heads; None: the model has no such heads."""

    is_croppable = False
    supports_early_init = False
    mosa: SelectedRows | None

    def __init__(self, config: MosaConfig) -> None:
        super().__init__()
        self.config = config
        self.reset()

    def reset(self) -> None:
        self.length = 0  # columns of the input so far, including padding
        for kind, create in ROWS.items():
            setattr(self, kind, create(self.config) if getattr(self.config, f"num_{kind}_heads") else None)

    def parts(self) -> dict[str, Rows]:
        """Return the storage of each kind of heads."""
        return {kind: rows for kind in ROWS if (rows := getattr(self, kind)) is not None}

    def get_seq_length(self) -> int:
        """Return the number of columns of the input so far, including padding."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that a mask covers, and the first of them."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions of transformers

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the batch by these of its sequences, as in beam search."""
        for rows in self.parts().values():
            for tensor in rows.tensors()[:1]:
                rows.select_sequences(beam_idx.to(tensor.device))

    batch_select_indices = reorder_cache

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError: a window has dropped the tokens that would be needed again."""
        raise ValueError("a MosaCache cannot be cropped; generate without drafts (assistant_model)")

    def lazy_initialization(self, *_: Any) -> None:
        pass  # buffers are allocated when there is something to store

    def update(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("heads of a MoSA model write into the parts of a MosaCacheLayer")


class MosaCache(Cache):
    """Keys and values of the sequences of a batch, layer by layer; it grows with them.

    Args:
        config: configuration of the model that will fill it.
    """

    def __init__(self, config: MosaConfig) -> None:
        self.layers: list[MosaCacheLayer]
        super().__init__(layers=[MosaCacheLayer(config) for _ in range(config.num_hidden_layers)])  # pyright: ignore
        self.shape = cache_shape(config)
        self.batch: int | None = None  # number of sequences; None: the cache is empty
        self.in_inference_mode = False  # in the latest call
        self.padded = False  # the first call had an attention mask with padding

    def leave_inference_mode(self) -> None:
        """Make what earlier calls stored under torch.inference_mode usable in this call, if it is outside of it."""
        inference = torch.is_inference_mode_enabled()
        if self.in_inference_mode and not inference:
            for layer in self.layers:
                for rows in layer.parts().values():
                    rows.leave_inference_mode()
        self.in_inference_mode = inference

    def bytes(self) -> dict[str, tuple[int, int]]:
        """Return the bytes allocated and the bytes in use over all layers, by kind of heads."""
        sums: dict[str, tuple[int, int]] = {}
        for layer in self.layers:
            for kind, rows in layer.parts().items():
                allocated, used = rows.bytes()
                before = sums.get(kind, (0, 0))
                sums[kind] = before[0] + allocated, before[1] + used
        return sums

    @property
    def max_cache_len(self) -> int:
        """-1, no limit. PEFT's prefix tuning reads it before the model can reject prefix tuning."""
        return -1

    def reset(self) -> None:
        super().reset()
        self.batch, self.padded = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self.batch = len(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.batch = len(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.batch is not None:
            self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))


def cache_shape(config: MosaConfig) -> dict[str, int]:
    """Return the sizes that a cache must share with the model that reads it."""
    names = (
        "num_hidden_layers",
        "head_dim",
        "num_key_value_heads",
        "num_local_heads",
        "local_window",
        "num_fixed_heads",
        "fixed_stride",
        "num_routing_heads",
        "num_mosa_heads",
    )
    return {name: getattr(config, name) for name in names}


def cache_entry(cache: MosaCache | None) -> dict[str, Any]:
    """Return the cache under its name in outputs and arguments, or an empty dictionary for None."""
    return {} if cache is None else {CACHE: cache}


def check_cache(cache: Any, config: MosaConfig, batch: int) -> None:
    """Check that a cache fits the model and the batch, and prepare it for a call.

    Raises:
        ValueError: the cache is of another class, model or batch size, or gradients are enabled.
    """
    if not isinstance(cache, MosaCache):
        raise ValueError(
            f"{CACHE} is a {type(cache).__name__}; expected the result of model.new_cache() (PEFT's prefix tuning "
            "passes keys and values, which heads that select tokens cannot use; use prompt tuning, IA3 or LoRA instead)"
        )
    if torch.is_grad_enabled():
        raise ValueError("a cache stores no gradients; call the model under torch.no_grad(), or with use_cache=False")
    for name, value in cache_shape(config).items():
        if cache.shape[name] != value:
            raise ValueError(f"{CACHE} belongs to another model: it has {name}={cache.shape[name]}, this model {value}")
    if cache.batch not in (None, batch):
        raise ValueError(f"{CACHE} has {cache.batch} sequences, but the input {batch}; expected the same number")
    cache.batch = batch
    cache.leave_inference_mode()
