"""What a run will be, from its configuration alone: size, memory, work and data."""

from __future__ import annotations

import os

import torch

from megatron_mosa.config import Config
from megatron_mosa.errors import UserError
from megatron_mosa.model import model_flops, parameter_count, state_bytes
from megatron_mosa.train.start import ResumePoint, validation_samples

_MIB = 2**20


def describe(config: Config, start: ResumePoint, world_size: int) -> str:
    """Return lines about a run of ``world_size`` processes, for ``--check-only``."""
    train, length = config.train, config.data.sequence_length
    vocab_size = start.manifest.vocab_size
    memory = state_bytes(config, vocab_size, world_size)
    parts = ", ".join(f"{name} {_size(size)}" for name, size in memory.items())
    documents = validation_samples(config, start.data).document_lengths()  # as the run itself counts
    flops = model_flops(config, vocab_size, documents) * train.global_batch_size
    tokens = train.global_batch_size * length
    available = sum(manifest.splits["train"]["tokens"] for manifest in start.data.manifests)
    epoch = max(available // tokens, 1)
    last = min(train.steps, train.stop_after_step or train.steps)
    origin = start.checkpoint or start.initial
    facts = {
        "run": f"{start.directory}: steps 1 to {last:,}" if origin is None else f"{start.directory}, from {origin}",
        "parameters": f"{parameter_count(config, vocab_size):,}, vocabulary {vocab_size:,}",
        "memory per rank": f"{_size(sum(memory.values()))}: {parts}; activations come on top",
        "a step": f"{tokens:,} tokens, {_scaled(flops)}FLOP on {world_size} process{'es' * (world_size > 1)}",
        "an epoch": f"{epoch:,} steps ({available:,} tokens); the run is {last * tokens / available:.3g} epochs",
    }
    width = max(map(len, facts))
    return "\n".join(f"{name:{width}}  {fact}" for name, fact in facts.items())


def refuse_impossible(config: Config, vocab_size: int) -> None:
    """Refuse a model that this machine cannot even build, in fp32 in its memory, or a micro-batch that cannot fit.

    Raises:
        UserError: one rank's weights, or on a CPU its logits, need more memory than the machine has.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    logits = 4 * config.train.micro_batch_size * config.data.sequence_length * vocab_size
    logits //= config.parallel.tensor_model_parallel_size
    if logits > memory and not torch.cuda.is_available():  # a GPU has kernels that never hold all of them
        raise UserError(
            f"train.micro_batch_size={config.train.micro_batch_size} sequences of {config.data.sequence_length} tokens "
            f"have logits of {_size(logits)} on each rank, but this machine has {_size(memory)}; lower "
            "train.micro_batch_size: a step still has train.global_batch_size sequences"
        )
    if config.parallel.zero_stage == 3:
        return  # divided while it is built
    needed = 4 * parameter_count(config, vocab_size) // config.parallel.tensor_model_parallel_size
    if needed > memory:
        raise UserError(
            f"the model has {parameter_count(config, vocab_size):,} parameters, whose fp32 weights take "
            f"{_size(needed)} on each rank while it is built, but this machine has {_size(memory)}; lower "
            "model.hidden_size or model.num_layers, raise parallel.tensor_model_parallel_size, or set "
            "parallel.zero_stage=3"
        )


def _size(number: float) -> str:
    return f"{number / _MIB:,.1f} MiB" if number < 2**30 else f"{number / 2**30:,.1f} GiB"


def _scaled(number: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} E"
