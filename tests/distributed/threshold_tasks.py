"""Tasks for worker processes: heads that select by thresholds."""

from __future__ import annotations

import math
from unittest import mock

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch import distributed as dist

from megatron_mosa.attention import num_selected_tokens, routing_heads
from megatron_mosa.attention.thresholds import mosa_layers, routing_layers, selection_buffers, update_thresholds
from megatron_mosa.checkpoint.format import read_state
from megatron_mosa.config import Config
from megatron_mosa.engine import DeepSpeedEngine
from megatron_mosa.kernels.naive import count_scores
from megatron_mosa.metrics import selection_statistics
from megatron_mosa.model import build_model
from megatron_mosa.parallel import data_parallel_group
from tests.distributed.tasks import VOCAB_SIZE, micro_batches, nan_loss_on_last_rank, parallel


def gather_heads(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gather the threshold buffers of all tensor-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    whole = {}
    for name, buffer in selection_buffers(model).items():
        parts = [torch.empty_like(buffer) for _ in range(group.size())]
        dist.all_gather(parts, buffer.contiguous(), group=group)
        whole[name] = torch.cat(parts)
    return whole


def facts(config: Config, seed_checkpoint: object, steps: int = 6) -> dict:
    """Return losses, thresholds after each step, the smallest distance from a score to a threshold, and more."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        read_state(engine, seed_checkpoint, optimizer_step=0)  # type: ignore[arg-type]
        layers = mosa_layers(engine.module)
        found: dict = {"losses": [], "thresholds": [], "loads": [], "margin": math.inf, "capacities": set()}
        for layer in layers:
            layer.records_selection = True
        for step in range(steps):
            before = [layer.thresholds.clone() for layer in layers]
            found["losses"].append(engine.train_step(micro_batches(config, layout, step), 1e-3).loss)
            found["thresholds"].append(gather_heads(engine.module))
            for layer, old in zip(layers, before, strict=True):
                assert layer.selection is not None
                scores, indices = layer.selection
                found["capacities"].add(indices.shape[-1])
                if step >= config.mosa.threshold_warmup_steps:
                    found["margin"] = min(found["margin"], (scores - old[:, None]).abs().min().item())
                assert not layer.histogram.any()  # the update used all counts
        found["types"] = {str(buffer.dtype) for buffer in selection_buffers(engine.module).values()}
        found["validation"] = engine.evaluate(micro_batches(config, layout, 99))
        assert not any(layer.histogram.any() for layer in layers)  # evaluation counts no scores
        engine.destroy()
    return found


def choice_facts(config: Config, seed_checkpoint: object, steps: int = 6) -> dict:
    """Return losses, the biases of token choice after each step, the smallest margin of a choice, and more."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        read_state(engine, seed_checkpoint, optimizer_step=0)  # type: ignore[arg-type]
        layers = mosa_layers(engine.module)
        found: dict = {"losses": [], "biases": [], "margin": math.inf, "dropped": 0}
        for layer in layers:
            layer.records_selection = True
        for step in range(steps):
            batches = micro_batches(config, layout, step)
            before = [layer.head_bias.clone() for layer in layers]
            found["losses"].append(engine.train_step(batches, 1e-3).loss)
            found["biases"].append(gather_heads(engine.module))
            for layer, bias in zip(layers, before, strict=True):
                assert layer.selection is not None and layer.dropped is not None
                found["dropped"] += int(layer.dropped.sum())
                best = (layer.selection[0] + bias[:, None]).sort(dim=1, descending=True).values
                if (number := config.heads_per_token) < best.shape[1]:
                    found["margin"] = min(found["margin"], (best[:, number - 1] - best[:, number]).min().item())
                assert not layer.choices.any()  # the update used all counts
        found["scores"] = selection_statistics(engine.module)["selected_score_mean"]  # of the last micro-batch
        found["largest bias"] = max(float(bias.abs().max()) for bias in found["biases"][-1].values())
        found["validation"] = engine.evaluate(micro_batches(config, layout, 99))
        assert not any(layer.choices.any() for layer in layers)  # evaluation counts nothing
        engine.destroy()
    return found


def routing_facts(config: Config, seed_checkpoint: object, steps: int = 6) -> dict:
    """Return losses, the centroids of Routing heads after each step, the smallest margin of a choice, and more."""
    margins: list[float] = []
    measure = routing_heads._nearness

    def measured(*args: Tensor) -> Tensor:
        nearness = measure(*args)  # [B, H, rho, T]
        taken = num_selected_tokens(nearness.shape[3], nearness.shape[2])
        of_clusters, of_tokens = (nearness.sort(dim, descending=True).values for dim in (3, 2))
        gaps = (of_clusters[..., taken - 1] - of_clusters[..., taken], of_tokens[:, :, 0] - of_tokens[:, :, 1])
        margins.extend(gap.min().item() for gap in gaps)
        return nearness

    with parallel(config) as layout, mock.patch.object(routing_heads, "_nearness", measured):
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        found: dict = {"losses": [], "initial": gather_heads(engine.module), "centroids": []}
        read_state(engine, seed_checkpoint, optimizer_step=0)  # type: ignore[arg-type]
        for step in range(steps):
            found["losses"].append(engine.train_step(micro_batches(config, layout, step), 1e-3).loss)
            found["centroids"].append(gather_heads(engine.module))
            assert not any(layer.cluster_sums.any() for layer in routing_layers(engine.module))
        found["validation"] = engine.evaluate(micro_batches(config, layout, 99))
        assert not any(layer.cluster_sums.any() for layer in routing_layers(engine.module))
        after = gather_heads(engine.module)
        assert all(torch.equal(after[name], before) for name, before in found["centroids"][-1].items())
        engine.destroy()
    return found | {"margin": min(margins)}


def thresholds_of_scores(config: Config, scores: Tensor) -> dict[str, Tensor]:
    """Return thresholds after updates with scores [steps, batch, E, T], split over data-parallel ranks."""
    with parallel(config) as layout:
        model = build_model(config, VOCAB_SIZE)
        size, rank = layout.data_parallel_size, layout.data_parallel_rank
        for step in scores:
            for layer in mosa_layers(model):
                mine = step.chunk(size)[rank].chunk(layout.tensor_parallel_size, dim=1)[layout.tensor_parallel_rank]
                for part in mine.split(1):  # micro-batches
                    count_scores(part, layer.histogram)
            update_thresholds(model, data_parallel_group())
        return gather_heads(model)


def nan_step(config: Config) -> tuple[bool, bool]:
    """Return whether a non-finite step left the thresholds unchanged, and counted no scores for the next step."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        engine.train_step(micro_batches(config, layout, 0), 1e-3)
        before = {name: buffer.clone() for name, buffer in selection_buffers(engine.module).items()}
        with nan_loss_on_last_rank(layout):
            engine.train_step(micro_batches(config, layout, 1), 1e-3)
        after = selection_buffers(engine.module)
        same = all(torch.equal(before[name], after[name]) for name in before)
        counts = [layer.histogram for layer in mosa_layers(engine.module)]
        counts += [layer.cluster_sums for layer in routing_layers(engine.module)]
        empty = not any(count.any() for count in counts)
        engine.destroy()
    return same, empty
