"""What a process does for test_acceleration.py."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention.thresholds import mosa_layers, selection_buffers, update_thresholds
from megatron_mosa.config import Config
from megatron_mosa.engine import DeepSpeedEngine
from megatron_mosa.engine.acceleration import choose_acceleration
from megatron_mosa.kernels import get_backend
from megatron_mosa.metrics import recorded_selection
from megatron_mosa.model import build_model, language_model_loss
from tests.distributed.tasks import VOCAB_SIZE, global_batch, master_weights, micro_batches, parallel, whole


def gradients(config: Config, precision: str) -> dict[str, Any]:
    """Errors of all gradients, of the fast path and of the plain one, against the plain one in fp32.

    Root mean squares over four batches: in one of them, a token more that rounding selects doubles an error.
    """
    with parallel(config) as layout:
        exact = build_model(config, VOCAB_SIZE).to(layout.device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        plain, fast = (build_model(config, VOCAB_SIZE, dtype).to(layout.device) for _ in range(2))
        for model in (plain, fast):
            for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
                parameter.data.copy_(rounded.data)  # the same weights in all three
        fast.compile_layers(get_backend("triton", next(fast.parameters())))
        errors: dict[str, list[Tensor]] = defaultdict(list)
        for number in range(6):
            batch = {name: tensor.to(layout.device) for name, tensor in global_batch(config, number).items()}
            losses, found = [], []
            for model in (fast, plain, exact):
                model.zero_grad()
                loss, count = language_model_loss(model, **batch)
                (loss / count).backward()
                update_thresholds(model, None)
                losses.append(loss.item())
                found.append({name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None})
            for name, value in found.pop().items() if number >= 2 else ():  # past the thresholds' warm-up
                errors[name].append(torch.stack([(of[name] - value).norm() / value.norm() for of in found]))
        config.train.precision = precision
        return {
            "chose": str(choose_acceleration(config, layout)),
            "exact loss": losses[2],
            "fast loss": losses[0],
            "errors": {name: torch.stack(of).square().mean(0).sqrt().tolist() for name, of in errors.items()},
        }


def _is_graphed(engine: DeepSpeedEngine) -> bool:
    graphed = engine._graphed
    return graphed is not None and graphed._captured is not None and graphed._captured.graph is not None


def _taken(selection: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return which tokens each head selected, bool [B, E, T]."""
    assert selection is not None
    scores, indices = selection
    taken = F.pad(torch.zeros_like(scores, dtype=torch.bool), (0, 1))  # empty slots hold T
    return taken.scatter_(-1, indices, True)[..., :-1].cpu()


def steps(config: Config, number: int) -> dict[str, Any]:
    """Losses, norms, a validation in between, how weights moved, and what the first step has selected and counted."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        before = master_weights(engine)
        results, validation, selected, thresholds = [], 0.0, [], []
        for step in range(number):
            if step == number - 2:
                validation = engine.evaluate(micro_batches(config, layout, 99))
            with recorded_selection(engine.module):
                results.append(engine.train_step(micro_batches(config, layout, step), 1e-3))
            if step == 0:
                selected = [_taken(heads.selection) for heads in mosa_layers(engine.module)]
                buffers = selection_buffers(engine.module).items()
                thresholds = [buffer.cpu().clone() for name, buffer in buffers if name.endswith("thresholds")]
        facts = {
            "chose": str(engine.acceleration),
            "losses": [result.loss for result in results],
            "norms": [result.grad_norm for result in results],
            "validation": validation,
            "moved": whole(
                engine.module, {name: weight - before[name] for name, weight in master_weights(engine).items()}
            ),
            "selected": selected,
            "is graphed": _is_graphed(engine),
            "thresholds": thresholds,
        }
        engine.destroy()
    return facts


def around_a_step_that_is_not_finite(config: Config) -> dict[str, Any]:
    """One with a NaN in the loss mask, one in which no token counts, and one after them."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        for step in range(3):
            engine.train_step(micro_batches(config, layout, step), 1e-3)

        def changed(value: float) -> list[dict[str, Tensor]]:
            batches = copy.deepcopy(micro_batches(config, layout, 5))
            for batch in batches:
                batch["loss_mask"] = torch.full_like(batch["loss_mask"], value)
            return batches

        before, count = engine.state(), engine.optimizer_step()
        bad, empty = engine.train_step(changed(torch.nan), 1e-3), engine.train_step(changed(0.0), 1e-3)
        after = engine.state()
        facts = {
            "is graphed": _is_graphed(engine),
            "bad is finite": bad.is_finite,
            "empty is finite": empty.is_finite or not empty.is_empty,
            "unchanged": all(torch.equal(before[key], after[key]) for key in before),
            "steps": count,
            "steps after": engine.optimizer_step(),
            "then finite": engine.train_step(micro_batches(config, layout, 6), 1e-3).is_finite,
        }
        engine.destroy()
    return facts


def shapes(config: Config) -> dict[str, list[float]]:
    """Losses of steps whose sequences are short for a while."""
    found = {}
    for name, asked in (("fast", "auto"), ("plain", "none")):
        config.train.acceleration = asked
        with parallel(config) as layout:
            engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
            found[name] = []
            for step, length in enumerate([24, 24, 16, 16, 16, 24, 24, 24]):
                batches = micro_batches(config, layout, step)
                short = [{key: tensor[:, :length] for key, tensor in batch.items()} for batch in batches]
                found[name].append(engine.train_step(short, 1e-3).loss)
            engine.destroy()
    return found


def choice(config: Config) -> str:
    """The line that says it."""
    with parallel(config) as layout:
        return str(choose_acceleration(config, layout))
