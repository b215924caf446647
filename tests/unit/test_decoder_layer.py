"""The layer that GPUs compile, here uncompiled, against Megatron's layer with the same parameters."""

from __future__ import annotations

import pytest
import torch

from megatron_mosa.attention.thresholds import mosa_layers, update_thresholds
from megatron_mosa.kernels import get_backend, naive
from megatron_mosa.model import build_model, language_model_loss
from megatron_mosa.model.mosa_gpt import MosaGPTModel
from megatron_mosa.parallel import Layout
from tests.distributed.tasks import VOCAB_SIZE, global_batch, tiny_config

KINDS: dict[str, dict] = {
    "hybrid": {},
    "dense": {"mosa__num_heads": 0, "model__num_query_groups": 2},
    "pure": {"model__num_dense_heads": 0},
    "llama": {"model__activation": "swiglu", "model__normalization": "RMSNorm", "model__rotary_percent": 1.0},
    "local": {"model__num_local_heads": 2, "model__attention_gate": True},
    "fixed": {"model__num_dense_heads": 0, "model__num_fixed_heads": 2, "model__fixed_stride": 3},
    "documents": {"model__attend_within_documents": True, "model__restart_rotary": True, "model__num_query_groups": 2},
    "attention": {"train__recompute": "attention"},
    "full": {"train__recompute": "full", "mosa__selection": "threshold", "mosa__threshold_warmup_steps": 1},
    "threshold": {"mosa__selection": "threshold", "mosa__threshold_warmup_steps": 1, "model__tie_embeddings": True},
}


def losses_and_gradients(model: MosaGPTModel, batch: dict) -> dict[str, torch.Tensor]:
    loss, _ = language_model_loss(model, **batch)
    (loss / 3).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(model.parameters()))
    model.zero_grad()
    return {"loss": loss.detach()} | found


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_those_of_megatrons_layers(layout: Layout, kind: str) -> None:
    config = tiny_config(train__micro_batch_size=2, **KINDS[kind])
    model = build_model(config, VOCAB_SIZE)
    names = dict(model.named_parameters()).keys()
    batch = {name: tensor[-2:, :12] for name, tensor in global_batch(config, 0).items()}
    if config.mosa.selection == "threshold":
        losses_and_gradients(model, batch)
        update_thresholds(model, None)
    wanted = losses_and_gradients(model, batch)
    counted = [heads.histogram.clone() for heads in mosa_layers(model) if config.mosa.selection == "threshold"]
    for heads in mosa_layers(model):
        if config.mosa.selection == "threshold":
            heads.histogram.zero_()

    # Not compiled, and on the plain kernels; the loss is interpreted.
    model.compile_layers(naive, get_backend("triton", torch.empty(0)).linear_cross_entropy, backend=None)
    assert dict(model.named_parameters()).keys() == names
    found = losses_and_gradients(model, batch)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)
    for heads, counts in zip(mosa_layers(model), counted, strict=False):
        assert torch.equal(heads.histogram, counts) and counts.any()
    model.eval()
    assert language_model_loss(model, **batch)[0].item() == pytest.approx(wanted["loss"].item(), rel=1e-3)
