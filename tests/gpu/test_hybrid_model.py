"""A HybridModel of MoSA layers computes what the GPTModel of the same weights does. Needs megatron-core 0.19."""

# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_mosa.config import Config
from megatron_mosa.model import build_model, transformer_config
from megatron_mosa.parallel import Layout
from tests.distributed.tasks import VOCAB_SIZE, global_batch, tiny_config

pytest.importorskip("megatron.core.models.hybrid.hybrid_model", reason="megatron-core before 0.19")


def weights_of_gpt_model(name: str) -> str:
    """The name in GPTModel: its layer n is two layers of HybridModel, 2n and 2n + 1."""
    if name.startswith("decoder.layers."):
        number, _, rest = name.removeprefix("decoder.layers.").partition(".")
        return f"decoder.layers.{int(number) // 2}.{rest}"
    return name.replace("decoder.final_norm", "decoder.final_layernorm")


def losses_and_gradients(model: torch.nn.Module, config: Config, device: str) -> tuple[torch.Tensor, dict]:
    batch = {name: tensor.to(device) for name, tensor in global_batch(config, 0).items()}
    positions = torch.arange(batch["tokens"].shape[1], device=device).expand_as(batch["tokens"])
    losses = model(batch["tokens"], positions, None, labels=batch["labels"])
    losses.sum().backward()
    return losses.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_the_same_weights_give_the_same_losses_and_gradients(
    layout: Layout, normalization: str, device: str = "cuda"
) -> None:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_mosa.attention.hybrid_model import get_mosa_hybrid_stack_spec

    config = tiny_config(model__normalization=normalization)
    model = build_model(config, VOCAB_SIZE).to(device)
    transformer = replace(transformer_config(config), num_layers=4)
    hybrid = HybridModel(
        transformer, get_mosa_hybrid_stack_spec(transformer), vocab_size=64, max_sequence_length=24,
        hybrid_layer_pattern="*-*-", position_embedding_type="none",
    ).to(device)  # fmt: skip
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            parameter.copy_(ours.pop(weights_of_gpt_model(name)))
    assert not ours
    wanted, gradients = losses_and_gradients(model, config, device)
    found, theirs = losses_and_gradients(hybrid, config, device)
    torch.testing.assert_close(found, wanted)
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradient, gradients[weights_of_gpt_model(name)], rtol=1e-4, atol=1e-6, msg=name)
