"""A lower bound for the memory of a layout, to spare runs that cannot fit."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from megatron_mosa.config import Config
from megatron_mosa.model import state_bytes

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """An accelerator of this machine; all of them are taken to be alike."""

    name: str
    gib: float
    """Its memory."""


def least_gib(config: Config, vocab_size: int, processes: int) -> float:
    """Return the GiB that a rank needs at least: its share of the state, and activations that no layer can do without.

    The state is exact but for small buffers. Of the activations of one micro-batch it counts what compiled layers keep:
    the residual stream, and without recomputation the input of the activation function. So a real run needs more, but
    none needs less.
    """
    state = sum(state_bytes(config, vocab_size, processes).values())
    return (state + _activation_bytes(config, config.parallel.tensor_model_parallel_size)) / GIB


def _activation_bytes(config: Config, tensor: int) -> float:
    model, train = config.model, config.train
    tokens = train.micro_batch_size * config.data.sequence_length
    stream = model.hidden_size / (tensor if config.parallel.sequence_parallel else 1)
    width = stream
    if train.recompute != "full":
        gates = 2 if model.activation == "swiglu" else 1
        width = 2 * stream + gates * model.mlp_width / tensor
    return model.num_layers * tokens * width * (2 if train.precision == "bf16" else 4)


def card() -> Card | None:
    """Return this machine's first NVIDIA GPU, without creating a CUDA context; None if nvidia-smi finds none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=60)
        name, mebibytes = done.stdout.splitlines()[0].rsplit(",", 1)
        return Card(name.strip(), float(mebibytes) / 1024)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def host_gib() -> float:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
