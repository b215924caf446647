"""Compute logits of a fixed batch with the Megatron model and the exported one, in one CPU process in fp32."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_mosa.config import Config

MOST_KL = 1e-6
_SHAPE = (2, 256)  # sequences, and maximum tokens per sequence
_BLOCK = 64  # tokens whose distributions are compared at a time


def fixed_batch(config: Config, vocab_rows: int) -> Tensor:
    """Return the same random tokens for a model every time: int64 [2, T], with T at most 256."""
    shape = (_SHAPE[0], min(_SHAPE[1], config.data.sequence_length))
    return torch.randint(vocab_rows, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def megatron_logits(config: Config, vocab_rows: int, read: Callable[[str], Tensor], tokens: Tensor) -> Tensor:
    """Compute logits [B, T, vocab_rows] of a GPTModel with the weights that ``read`` returns for Megatron's names.

    Creates single-process groups and destroys them again.
    """
    from megatron_mosa.kernels import Documents
    from megatron_mosa.model import build_empty_model

    with single_process_groups(config):
        model = build_empty_model(config, vocab_rows).eval()
        load_weights(model, read)
        within = config.model.attend_within_documents
        documents = Documents.from_starts(torch.zeros_like(tokens)) if within else None  # one per sequence
        return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), documents)


@torch.no_grad()
def load_weights(model: torch.nn.Module, read: Callable[[str], Tensor], names: Collection[str] | None = None) -> None:
    """Copy weights, and thresholds, biases and centroids of heads, into a single-process model.

    Args:
        model: a GPTModel.
        read: returns the tensor of a Megatron name, in checkpoint shape.
        names: the names that ``read`` knows; None: all. Buffers that are not among them keep their values.
    """
    from megatron_mosa.model import stored_tensors

    for name, (tensor, partition, is_trained) in stored_tensors(model).items():
        if names is not None and name not in names and not is_trained:
            continue
        weight = read(name)
        if partition is not None and partition.stride > 1:
            weight = partition.fold(weight)
        tensor.copy_(weight)


@contextmanager
def single_process_groups(config: Config) -> Iterator[None]:
    """Create Megatron's process groups for a single process, without port or launcher, and destroy them on exit."""
    from megatron_mosa.parallel import destroy_parallel, initialize_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        initialize_parallel(1, config.run.seed)
        yield
    finally:
        destroy_parallel()


@torch.no_grad()
def exported_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Compute logits [B, T, vocab_rows] of an exported model in fp32, whatever dtype it is stored in."""
    from transformers.utils import logging

    from megatron_mosa.hf.modeling_mosa import MosaForCausalLM

    logging.disable_progress_bar()
    model = MosaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(tokens).logits


def largest_divergence(expected: Tensor, found: Tensor) -> float:
    """Return the largest KL divergence of next-token distributions over all tokens, in nats; logits [B, T, V]."""
    largest = 0.0
    blocks = zip(expected.flatten(0, 1).split(_BLOCK), found.flatten(0, 1).split(_BLOCK), strict=True)
    for ours, theirs in blocks:
        log_p, log_q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        largest = max(largest, divergence.nan_to_num(torch.inf).max().item())
    return largest
