"""Build Megatron-core's GPT and save its checkpoints the way Megatron-LM does from its arguments."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.safe_globals import SAFE_GLOBALS
from megatron.core.transformer import TransformerConfig
from packaging.version import Version
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.serialization import safe_globals

from megatron_mosa.parallel import destroy_parallel, initialize_parallel
from tests.distributed import tasks

ROWS = 128
ARGUMENTS: dict[str, Any] = dict(
    num_layers=3, hidden_size=24, num_attention_heads=4, group_query_attention=True, num_query_groups=2, kv_channels=8,
    ffn_hidden_size=40, swiglu=True, normalization="RMSNorm", norm_epsilon=1e-3, position_embedding_type="rope",
    rotary_percent=0.5, rotary_base=500, untie_embeddings_and_output_weights=True, add_bias_linear=False,
    max_position_embeddings=40, init_method_std=0.3, padded_vocab_size=ROWS,
)  # fmt: skip
OTHER_ARGUMENTS = ARGUMENTS | dict(
    group_query_attention=False, num_query_groups=1, swiglu=False, normalization="LayerNorm", rotary_percent=1.0,
    untie_embeddings_and_output_weights=False,
)  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "per layer": {"non_homogeneous_layers": True},
    "separate halves": {"singleton_local_shards": True},
}


def build_gpt(arguments: dict[str, Any], size: int) -> GPTModel:
    """Build a GPT on the CPU, with full logits on every rank; the process groups must be initialized."""
    args = Namespace(**arguments)
    epsilon = arguments.get("norm_epsilon") or args.layernorm_epsilon  # the name since 0.19
    config = TransformerConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads, kv_channels=args.kv_channels,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        normalization=args.normalization, layernorm_epsilon=epsilon, init_method_std=args.init_method_std,
        gated_linear_unit=args.swiglu, activation_func=F.silu if args.swiglu else F.gelu,
        add_bias_linear=args.add_bias_linear, tensor_model_parallel_size=size, use_cpu_initialization=True,
        attention_dropout=0.0, hidden_dropout=0.0, persist_layer_norm=False, bias_dropout_fusion=False,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=args.normalization),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=False,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    ).eval()


@torch.no_grad()
def logits(model: GPTModel, tokens: Tensor) -> Tensor:
    """Compute logits [B, T, V] of tokens [B, T]."""
    length = tokens.shape[1]
    is_hidden = torch.ones(length, length).triu(1).bool().expand(len(tokens), 1, length, length)
    return model(tokens, torch.arange(length).expand_as(tokens), is_hidden)


@torch.no_grad()
def save_gpt(
    arguments: dict[str, Any],
    size: int,
    folder: Path,
    way: str,
    tokens: Tensor,
    common_file: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Save a random model as Megatron-LM would after iteration 7, and return its logits, computed in fp32.

    The process groups must be initialized.

    Args:
        arguments: Megatron-LM's arguments, of the model and others.
        size: tensor-parallel size.
        folder: the folder to create.
        way: a key of WAYS.
        tokens: input for the logits, [B, T].
        common_file: False: store non-tensor content where Megatron-core 0.19 does, whichever version is installed.
        dtype: dtype of the weights in the checkpoint.
    """
    model = build_gpt(arguments, size)
    generator = torch.Generator().manual_seed(3)  # for norms only, which are replicated on every rank
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(("weight" in name) + 0.3 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype)
    iteration = folder / "iter_0000007"
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        iteration.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    weights = model.sharded_state_dict(metadata=WAYS[way] | {"dp_cp_group": group})
    common: dict[str, Any] = {"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 7}
    if not common_file and Version(version("megatron-core")) < Version("0.19"):
        dist_checkpointing.save(
            {"model": weights, "": ShardedObject("common_state", common, (1,), (0,))}, str(iteration)
        )
        (iteration / "common.pt").unlink()
        config = json.loads((iteration / "metadata.json").read_text())
        kept = {key: value for key, value in config.items() if key.startswith("sharded")}
        (iteration / "metadata.json").write_text(json.dumps(kept))
    else:
        dist_checkpointing.save(common | {"model": weights}, str(iteration))
    return logits(model.float(), tokens)


@torch.no_grad()
def load_gpt(arguments: dict[str, Any], size: int, iteration: Path, tokens: Tensor) -> Tensor:
    """Load a checkpoint into a fresh model with Megatron; return its logits. The process groups must be initialized."""
    model = build_gpt(arguments, size)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    with safe_globals(SAFE_GLOBALS):  # as Megatron-LM does at startup
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(iteration))
    model.load_state_dict(loaded["model"])
    return logits(model, tokens)


@contextmanager
def one_rank() -> Iterator[None]:
    """Initialize Megatron's process groups in this process."""
    initialize_parallel(1, seed=1)
    try:
        yield
    finally:
        destroy_parallel()


def on_two_ranks(function: Callable[..., Tensor], arguments: dict[str, Any], *rest: Any) -> Tensor:
    """Call ``save_gpt`` or ``load_gpt`` at tensor-parallel size 2 in a worker process."""
    with tasks.parallel(tasks.tiny_config(parallel__tensor_model_parallel_size=2)):
        return function(arguments, 2, *rest)
