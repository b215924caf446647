"""Tasks for worker processes: losses and gradients over micro-batches and ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_mosa.config import Config
from megatron_mosa.data import validation_batches
from megatron_mosa.engine import Batch, DeepSpeedEngine, StepResult
from megatron_mosa.model import build_model
from tests.distributed.tasks import (
    VOCAB_SIZE,
    global_batch,
    micro_batches,
    parallel,
    recorded_gradients,
    token_losses,
)


def engine_step(config: Config) -> tuple[StepResult, dict[str, Tensor], dict[str, Tensor]]:
    """Return the result and gradients of an engine's first step, and the state after it."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        with recorded_gradients(engine) as gradients:
            result = engine.train_step(micro_batches(config, layout, 0), 1e-3)
        state = engine.state()
        engine.destroy()
    return result, gradients, state


def plain_step(config: Config) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and gradients of a plain model in one process, summed over micro-batches in fp32."""
    with parallel(config) as layout:
        model = build_model(config, VOCAB_SIZE)
        model.to(layout.device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
        counted = global_batch(config, 0)["loss_mask"].sum()
        loss = 0.0
        gradients = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
        for batch in micro_batches(config, layout, 0):
            part = token_losses(model, batch, layout)[batch["loss_mask"] == 1].sum() / counted
            part.backward()
            loss += part.item()
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                gradients[name] += parameter.grad.float().cpu()
            model.zero_grad()
    return loss, gradients


def empty_step(config: Config) -> tuple[StepResult, bool, StepResult]:
    """Return the result of a step without counted tokens, whether it changed nothing, and the next step's result."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        engine.train_step(micro_batches(config, layout, 0), 1e-3)
        before = {key: tensor.clone() for key, tensor in engine.state().items()}
        batches = micro_batches(config, layout, 1)
        with pytest.raises(ValueError, match="a step takes 2 micro-batches, got 1"):
            engine.train_step(batches[:1], 1e-3)
        empty = engine.train_step([batch | {"loss_mask": 0 * batch["loss_mask"]} for batch in batches], 1e-3)
        after = engine.state()
        unchanged = all(torch.equal(before[key], after[key]) for key in before) and engine.optimizer_step() == 1
        result = engine.train_step(batches, 1e-3)
        engine.destroy()
    return empty, unchanged, result


def validation_loss(config: Config, count: int) -> float:
    """Return the engine's validation loss over ``count`` samples."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        batches = validation_batches(
            _samples(config, count),  # type: ignore[arg-type]
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=layout.data_parallel_rank,
            data_parallel_size=layout.data_parallel_size,
        )
        loss = engine.evaluate(batches)
        engine.destroy()
    return loss


@torch.no_grad()
def plain_validation_loss(config: Config, count: int) -> float:
    """Return the mean loss over all tokens of the samples, computed sample by sample."""
    with parallel(config) as layout:
        model = build_model(config, VOCAB_SIZE).to(layout.device)
        samples = [{name: row[None] for name, row in sample.items()} for sample in _samples(config, count)]
        return torch.cat([token_losses(model, sample, layout) for sample in samples]).double().mean().item()


def _samples(config: Config, count: int) -> list[Batch]:
    """Return ``count`` samples of which all tokens count, like those of a validation split."""
    config.train.global_batch_size = count
    batch = global_batch(config, 99)
    batch["loss_mask"] = torch.ones_like(batch["loss_mask"])
    return [{name: rows[number] for name, rows in batch.items()} for number in range(count)]
