"""Chooses the fastest training step that is safe for a configuration and device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed as dist

from megatron_mosa.config import Config
from megatron_mosa.kernels import get_backend
from megatron_mosa.parallel import Layout, apex_fused_adam

OLDEST_TORCH = (2, 11)  # the oldest release that this was measured with


@dataclass(frozen=True)
class Acceleration:
    """The choice that ``train.acceleration`` led to; ``str`` returns the line for the log."""

    compiles_layers: bool = False
    """Training uses compiled layers, and the loss is computed in chunks of the logits."""

    uses_graphs: bool = False
    """Each micro-batch is one CUDA graph, which accumulates its gradients in fp32."""

    hindrance: str = ""
    """What prevents a faster step, such as "train.precision=fp32"; empty if nothing does."""

    overlaps: bool = False
    """Tensor-parallel collectives of one half of a micro-batch run beside the computation of the other."""

    no_overlap: str = ""
    """What prevents that; empty if nothing does, or without tensor parallelism or with the switch off."""

    def __str__(self) -> str:
        if not self.compiles_layers:
            return f"acceleration: none: {self.hindrance}"
        overlap = ", collectives beside computation" if self.overlaps else ""
        overlap = f", no overlap of collectives: {self.no_overlap}" if self.no_overlap else overlap
        graphs = "each micro-batch one CUDA graph" if self.uses_graphs else f"no CUDA graphs: {self.hindrance}"
        return f"acceleration: compiled layers, {graphs}{overlap}"


def choose_acceleration(config: Config, layout: Layout) -> Acceleration:
    """Choose before the model is built: a process cannot recover from a failed capture."""
    if hindrance := next(_against_compiled_layers(config, layout), None):
        return Acceleration(hindrance=hindrance)
    hindrance = next(_against_graphs(config), "")
    applies = config.parallel.tensor_model_parallel_size > 1 and config.parallel.tensor_parallel_overlap == "auto"
    no_overlap = next(_against_overlap(config), "") if applies else ""
    return Acceleration(
        compiles_layers=True,
        uses_graphs=not hindrance,
        hindrance=hindrance,
        overlaps=applies and not no_overlap,
        no_overlap=no_overlap,
    )


def _against_compiled_layers(config: Config, layout: Layout) -> Iterator[str]:
    """Yield each reason why layers cannot be compiled."""
    model, train = config.model, config.train
    if train.acceleration == "none":
        yield "train.acceleration=none"
    if layout.device.type != "cuda":
        yield f"on {layout.device.type}"
        return
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        yield f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if train.apex == "always":
        yield "train.apex=always asks for apex's norms"
    if model.attend_within_documents and train.precision == "fp32":
        yield "model.attend_within_documents=true in fp32, which flash attention does not support"
    if config.mosa.selection_scope == "document":
        yield "mosa.selection_scope=document, which selects another number of tokens in each batch"
    states = torch.empty(0, dtype=torch.bfloat16 if train.precision == "bf16" else torch.float32, device=layout.device)
    try:
        triton = get_backend("triton", states, model.head_dim)
    except ValueError as error:
        yield str(error)
    else:
        if config.mosa.num_heads and get_backend(config.mosa.backend, states, model.head_dim) is not triton:
            yield "MoSA heads do not run on Triton's kernels"
    if dist.is_initialized() and "cuda:gloo" in dist.get_backend_config():
        yield "collectives over gloo, with which compiled layers crash"


def _against_graphs(config: Config) -> Iterator[str]:
    """Yield each reason why a micro-batch of compiled layers cannot be a CUDA graph."""
    parallel = config.parallel
    if parallel.zero_stage == 0:
        yield "parallel.zero_stage=0"
    if config.train.precision != "bf16":
        yield f"train.precision={config.train.precision}"
    if parallel.offload_optimizer:
        yield "parallel.offload_optimizer=true"
    if parallel.zero_stage < 3 and config.train.apex != "never" and apex_fused_adam() is not None:
        yield "apex's FusedAdam is in use (train.apex=never turns it off)"


def _against_overlap(config: Config) -> Iterator[str]:
    """Yield each reason why compiled layers cannot run on halves of a micro-batch in turn."""
    if config.parallel.zero_stage == 3:
        yield "parallel.zero_stage=3, which gathers the weights of a layer for one call"
    if config.train.micro_batch_size % 2:
        yield f"train.micro_batch_size={config.train.micro_batch_size} is odd"
    if config.train.recompute != "none":
        yield f"train.recompute={config.train.recompute}"
    if config.model.attend_within_documents:
        yield "model.attend_within_documents=true"
