"""The time that a model takes to decode a token, once its cache holds a context: ``mosa decode-bench``."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mosa.errors import UserError
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM
from megatron_mosa.utils import progress

_PIECE = 32_768  # tokens of the context per call; the kernels of training read the first one


@dataclass(frozen=True)
class DecodingSpeed:
    """How fast a batch of sequences continues after a context."""

    batch: int
    context: int
    tokens_per_second: float
    """Of all sequences together."""

    milliseconds_per_step: float
    """One token of each sequence."""

    slower_repetition: float
    """By which share the slower of two repetitions took longer."""

    prefill_tokens_per_second: float
    cache_gib: float
    """In use."""

    cache_allocated_gib: float


def random_tokens(model: MosaForCausalLM, batch: int, context: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return a random context [1, T], and random tokens to continue it with, as ``measure`` takes them."""
    vocabulary = model.config.vocab_size
    return torch.randint(vocabulary, (1, context)), torch.randint(vocabulary, (batch, 3 * steps))


@torch.no_grad()
def measure(model: MosaForCausalLM, context: Tensor, tokens: Tensor) -> DecodingSpeed:
    """Fill a cache with a context, copy it for each sequence, and time steps of one token per sequence.

    Args:
        context: tokens [1, T].
        tokens: what the sequences continue with, [B, 3 N]: N steps of warm-up, and two repetitions of N timed steps.

    Raises:
        UserError: the copies need more memory than the device has.
    """
    device = model.device
    batch, steps = len(tokens), tokens.shape[1] // 3
    context, tokens = context.to(device), tokens.to(device)
    with progress(3 * context.shape[1], "reading the context three times", unit=" tokens") as bar:
        for _ in range(3):  # in the first two, kernels are compiled: the second knows how much room the first needed
            cache = model.new_cache()
            start = _now(device)
            for piece in context.split(_PIECE, dim=1):
                model(piece, logits_to_keep=1, **{CACHE: cache})
                bar.update(piece.shape[1])
            prefill = _now(device) - start
    _check_memory(batch * sum(allocated for allocated, _ in cache.bytes().values()), batch, context.shape[1], device)
    cache.batch_repeat_interleave(batch)
    for step in range(steps):  # warm-up, in which kernels are chosen and buffers grow
        model(tokens[:, step : step + 1], **{CACHE: cache})
    seconds = []
    for repetition in (1, 2):
        start = _now(device)
        for step in range(repetition * steps, (repetition + 1) * steps):
            model(tokens[:, step : step + 1], **{CACHE: cache})
        seconds.append(_now(device) - start)
    sizes = cache.bytes().values()
    return DecodingSpeed(
        batch=batch,
        context=context.shape[1],
        tokens_per_second=batch * steps / min(seconds),
        milliseconds_per_step=1000 * min(seconds) / steps,
        slower_repetition=max(seconds) / min(seconds) - 1,
        prefill_tokens_per_second=context.shape[1] / prefill,
        cache_gib=sum(used for _, used in sizes) / 2**30,
        cache_allocated_gib=sum(allocated for allocated, _ in sizes) / 2**30,
    )


def _check_memory(needed: int, batch: int, context: int, device: torch.device) -> None:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"--batch={batch} needs {needed / 2**30:,.1f} GiB for keys and values of --context={context}, but this "
            f"device has {memory / 2**30:,.1f} GiB; lower one of them"
        )


def _now(device: torch.device) -> float:
    """Return the time in seconds once the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
