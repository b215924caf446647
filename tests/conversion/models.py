"""Write checkpoints of small Megatron models of every kind, and compute their logits with Megatron."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from megatron_mosa.attention.thresholds import is_causal, selection_buffers
from megatron_mosa.checkpoint import Metadata
from megatron_mosa.checkpoint.format import as_dtensors
from megatron_mosa.checkpoint.manifest import files_below, hash_files, write_manifest
from megatron_mosa.checkpoint.metadata import write_metadata
from megatron_mosa.config import Config, config_to_dict, load_config
from megatron_mosa.data import tokenizer_hash
from megatron_mosa.kernels import Documents
from megatron_mosa.model import build_empty_model

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TINY = [
    "model.num_layers=2", "model.hidden_size=24", "model.head_dim=8", "data.sequence_length=40", "mosa.sparsity=4",
    "parallel.tensor_model_parallel_size=1",
]  # fmt: skip
KINDS = {
    "dense": [
        "model.num_dense_heads=4", "model.num_query_groups=2", "mosa.num_heads=0", "model.normalization=RMSNorm",
        "model.activation=swiglu", "model.tie_embeddings=true", "model.rotary_percent=1.0",
    ],
    "gelu": ["model.num_dense_heads=4", "mosa.num_heads=0", "model.ffn_hidden_size=40", "model.layernorm_epsilon=1e-4"],
    "local": [
        "model.num_dense_heads=0", "model.num_local_heads=4", "model.local_window=7", "mosa.num_heads=0",
        "model.ffn_hidden_size=40", "model.layernorm_epsilon=1e-3",
    ],
    "hybrid": [
        "model.num_dense_heads=2", "model.num_local_heads=2", "mosa.num_heads=6", "mosa.include_first_token=false",
        "model.normalization=RMSNorm", "model.activation=swiglu", "model.rotary_base=500.0",
        "model.attend_within_documents=true", "model.restart_rotary=true", "mosa.selection_scope=document",
    ],
    "pure": ["model.num_dense_heads=0", "mosa.num_heads=6", "model.tie_embeddings=true"],
    "chosen": ["model.num_dense_heads=2", "mosa.num_heads=8", "mosa.selection=token_choice"],
    "fixed": [
        "model.num_dense_heads=2", "model.num_fixed_heads=4", "model.fixed_stride=3", "model.attention_gate=true",
        "mosa.num_heads=0",
    ],
    "routing": [
        "model.num_dense_heads=2", "model.num_routing_heads=4", "model.routing_clusters=5", "mosa.num_heads=0",
    ],
}  # fmt: skip

CAUSAL = ["model.num_dense_heads=2", "mosa.num_heads=6", "mosa.selection=threshold", "mosa.load_feedback=0.05"]


@dataclass(frozen=True)
class Trained:
    """A checkpoint, and the weights and logits of the Megatron model it was saved from."""

    checkpoint: Path
    config: Config
    weights: dict[str, Tensor]
    """Every parameter in the model's layout, keyed by global name."""

    tokens: Tensor
    logits: Tensor


@torch.no_grad()
def train(directory: Path, data: Path, options: list[str], updates: int = 7) -> Trained:
    """Write a checkpoint of random weights into a run directory; the process groups must be initialized.

    Args:
        updates: of thresholds, which select about a quarter of the tokens; 0: they have not been set.
    """
    config = load_config(QUICKSTART, [*TINY, *options, f"data.path={data}"])
    model = build_empty_model(config, 300).eval()  # rows of the embedding: 384
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() > 1 else 0.1
        center = 0.0 if parameter.dim() > 1 else 1.0
        parameter.copy_(center + spread * torch.randn(parameter.shape, generator=generator))
    for name, buffer in selection_buffers(model).items() if updates else ():
        if name.endswith("centroids"):
            buffer.normal_(generator=generator).div_(buffer.norm(dim=-1, keepdim=True))
        else:
            buffer.copy_(
                updates if name.endswith("updates") else 0.6 + 0.1 * torch.rand(buffer.shape, generator=generator)
            )
    state = {}
    for name, parameter in model.named_parameters():
        state |= {
            f"model.{name}": parameter.detach().clone(),
            f"exp_avg.{name}": torch.randn(parameter.shape, generator=generator),
            f"exp_avg_sq.{name}": torch.rand(parameter.shape, generator=generator),
        }
    state |= {f"model.{name}": buffer.clone() for name, buffer in selection_buffers(model).items()}
    checkpoint = directory / "checkpoints" / "step-00000012"
    checkpoint.mkdir(parents=True)
    dcp.save(as_dtensors(model, state), checkpoint_id=checkpoint / "state")
    metadata = Metadata(
        step=12,
        consumed_samples=192,
        optimizer_step=11,
        config=config_to_dict(config),
        data={
            "index_samples": 400,
            "tokenizer_hash": tokenizer_hash(data / "tokenizer.json"),
            "vocab_size": 300,
            "fingerprint": "0123abcd",
        },
        versions={"torch": torch.__version__},
        layout={"tensor_parallel_size": 1, "data_parallel_size": 1},
    )
    write_metadata(metadata, checkpoint)
    write_manifest(checkpoint, hash_files(checkpoint, files_below(checkpoint)))
    lines = {"step": 12, "validation_loss": 4.25, "causal": is_causal(model)}, {"step": 13, "loss": 9.0}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokens = torch.randint(300, (3, 40), generator=generator)
    documents = Documents.from_starts(torch.zeros_like(tokens)) if config.model.attend_within_documents else None
    logits = model(tokens, torch.arange(40).expand_as(tokens), documents)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Trained(checkpoint, config, weights, tokens, logits)
