"""Tasks for worker processes: module-level functions, so that they can be pickled by name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing, parallel_state
from torch import Tensor
from torch import distributed as dist

from megatron_mosa.attention.mosa_heads import MosaHeads
from megatron_mosa.checkpoint import load_initial_weights
from megatron_mosa.checkpoint.format import read_state, snapshot, write_state
from megatron_mosa.checkpoint.host_memory import HostMemory
from megatron_mosa.checkpoint.reader import StateReader
from megatron_mosa.config import Config, config_from_dict
from megatron_mosa.engine import DeepSpeedEngine, deepspeed_engine, optimizer
from megatron_mosa.engine.optimizer import MOMENTS
from megatron_mosa.engine.protocol import Batch
from megatron_mosa.kernels import Documents
from megatron_mosa.model import build_model
from megatron_mosa.model.state import stored_tensors
from megatron_mosa.parallel import (
    Layout,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    initialize_parallel,
    partition_of,
    use_deterministic_algorithms,
)
from tests.distributed.fused_adam import FakeFusedAdam

VOCAB_SIZE = 61  # a prime, padded to 64
RATES = (1e-3, 4e-4)  # learning rates of even and odd steps


def tiny_config(**changes: object) -> Config:
    """Return a hybrid small enough to compare everything; ``changes`` have the form section__key=value."""
    tree: dict = {
        "run": {"name": "tiny", "seed": 5},
        "model": dict(num_layers=2, hidden_size=24, num_dense_heads=4, head_dim=8, vocab_size_multiple=64),
        "mosa": dict(num_heads=8, sparsity=4.0, include_first_token=True),
        "parallel": {},
        "data": dict(path="unused", sequence_length=24),
        "train": dict(steps=100, micro_batch_size=4, global_batch_size=4, precision="fp32"),
        # Strong enough that a few steps reveal what is missing or applied to the wrong parameters.
        "optimizer": dict(gradient_clipping=0.5, weight_decay=20.0, beta1=0.7, beta2=0.6),
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return config_from_dict(tree)


_layouts: dict[int, tuple[Layout, dict[str, Any]]] = {}  # by tensor-parallel size, with Megatron's groups


@contextlib.contextmanager
def parallel(config: Config) -> Iterator[Layout]:
    """Initialize Megatron's groups for a task. They are kept for later tasks of the same tensor-parallel size."""
    use_deterministic_algorithms()
    size = config.parallel.tensor_model_parallel_size
    groups = vars(parallel_state)
    if size in _layouts:
        groups.update(_layouts[size][1])
    else:
        groups.update(_no_groups)
        layout = initialize_parallel(size, config.run.seed)
        _layouts[size] = layout, {name: groups[name] for name in _no_groups}
    torch.manual_seed(config.run.seed)
    yield _layouts[size][0]


# Megatron keeps its groups in module variables.
_no_groups = {name: None for name, value in vars(parallel_state).items() if name.startswith("_") and value is None}


def global_batch(config: Config, step: int) -> Batch:
    """Return a batch of random tokens [global batch, T], the same on every rank and layout.

    No token occurs twice in a sequence: in the first layer equal tokens have equal scores, and rounding decides whether
    such ties stay exact. Of the first sequence no token counts, of the last all, of the others some, so micro-batches
    and ranks have different numbers of counted tokens, including none.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    length = config.data.sequence_length
    shuffled = [torch.randperm(VOCAB_SIZE, generator=generator) for _ in range(config.train.global_batch_size)]
    tokens = torch.stack(shuffled)[:, : length + 1]
    counted = torch.linspace(0, 1, len(tokens)).unsqueeze(1)
    mask = (torch.rand(len(tokens), length, generator=torch.Generator().manual_seed(step)) < counted).float()
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}
    if config.model.attend_within_documents:
        begins = torch.rand(mask.shape, generator=generator) < 0.15
        begins[:, 0] = True
        batch["document_starts"] = torch.where(begins, torch.arange(length), 0).cummax(dim=1).values
    return batch


def micro_batches(config: Config, layout: Layout, step: int) -> list[Batch]:
    """Return this rank's micro-batches of a step."""
    batch = global_batch(config, step)
    share = config.train.global_batch_size // layout.data_parallel_size
    first = layout.data_parallel_rank * share
    mine = {name: tensor[first : first + share].split(config.train.micro_batch_size) for name, tensor in batch.items()}
    return [dict(zip(mine, parts, strict=True)) for parts in zip(*mine.values(), strict=True)]


def whole(model: torch.nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather the tensor-parallel slices of parameters (or their gradients) into whole tensors."""
    group = parallel_state.get_tensor_model_parallel_group()
    result = {}
    for name, parameter in model.named_parameters():
        tensor = tensors[name].detach().to(parameter.device).contiguous()  # NCCL cannot send CPU tensors
        if (partition := partition_of(parameter)) is not None:
            parts = [torch.empty_like(tensor) for _ in range(group.size())]
            dist.all_gather(parts, tensor, group=group)
            tensor = torch.cat([p.unflatten(partition.dim, (partition.stride, -1)) for p in parts], partition.dim + 1)
            tensor = tensor.flatten(partition.dim, partition.dim + 1)
        result[name] = tensor.to("cpu", copy=True)
    return result


def master_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Return this tensor-parallel rank's fp32 weights."""
    state = engine.state()
    return {name: state[f"model.{name}"] for name, _ in engine.module.named_parameters()}


def selection_margin(model: torch.nn.Module, batch: Batch) -> float:
    """Return the smallest gap between a selected and an unselected score in what the forward pass recorded.

    Of a head's tokens, or with token choice of a token's heads. Compiled layers record one sequence.
    """
    all_starts = batch.get("document_starts", torch.zeros_like(batch["tokens"]))  # [B, T]
    margins = []
    for heads in model.modules():
        if isinstance(heads, MosaHeads) and heads.selection is not None:
            scores, indices = (tensor.cpu() for tensor in heads.selection)
            if heads.config.mosa_selection == "token_choice":
                best = (scores + heads.head_bias.cpu()[:, None]).sort(dim=1, descending=True).values
                number = heads.config.heads_per_token
                margins.append((best[:, number - 1] - best[:, number]).min().item())
                continue
            starts = all_starts[: len(scores)]
            first = starts == torch.arange(starts.shape[1])  # selected regardless of its score
            chosen = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool)  # index T marks empty slots
            chosen = chosen.scatter(-1, indices, True)[..., :-1]
            gaps = scores.unsqueeze(-1) - scores.unsqueeze(-2)  # [B, E, T, T]
            compete = (chosen & ~first.unsqueeze(1)).unsqueeze(-1) & ~chosen.unsqueeze(-2)
            if heads.config.mosa_selection_scope == "document":
                compete = compete & (starts.unsqueeze(-1) == starts.unsqueeze(-2)).unsqueeze(1)
            margins.append(gaps[compete].min().item())
    return min(margins, default=math.inf)  # a model without MoSA heads


def write_seed_checkpoint(config: Config, path: Path) -> None:
    """Write the engine's state before any step."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        write_state(snapshot(engine, HostMemory()), path, None)
        engine.destroy()


def save_after_training(config: Config, path: Path) -> float:
    """Write the engine's state after two steps; return the loss of the third."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        drawn = torch.get_rng_state()
        for step in range(2):
            engine.train_step(micro_batches(config, layout, step), 1e-3)
        assert torch.equal(torch.get_rng_state(), drawn)  # steps draw no random numbers, so the seed determines all
        write_state(snapshot(engine, HostMemory()), path, None)
        loss = engine.train_step(micro_batches(config, layout, 2), 1e-3).loss
        engine.destroy()
    return loss


def snapshot_sizes(config: Config) -> tuple[int, int]:
    """Return the number of elements of this rank's snapshot, and of the whole state of its tensor-parallel rank."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        share, whole = snapshot(engine, HostMemory()), engine.state()
        engine.destroy()
    return sum(t.to_local().numel() for t in share.values()), sum(t.numel() for t in whole.values())  # type: ignore


def load_each(config: Config, paths: list[Path]) -> list[tuple[int, float]]:
    """Load each state that ``save_after_training`` wrote.

    Returns:
        For each, the number of this rank's weights and moments that differ from the files, and the loss of the third
        step.
    """
    with parallel(config) as layout:
        engine, found = DeepSpeedEngine(config, VOCAB_SIZE, layout), []
        tensors = stored_tensors(engine.module)
        for path in paths:
            read_state(engine, path, optimizer_step=2)
            reader, unequal = StateReader(path), 0
            for key, tensor in engine.state().items():
                expected, partition = reader.read(key), tensors[key.partition(".")[2]].partition
                if partition is not None:
                    expected = expected.flatten(partition.dim, partition.dim + int(partition.stride > 1))
                    expected = partition.part_of(expected, layout.tensor_parallel_rank, layout.tensor_parallel_size)
                unequal += not torch.equal(expected, tensor)
            found.append((unequal, engine.train_step(micro_batches(config, layout, 2), 1e-3).loss))
        engine.destroy()
    return found


@contextlib.contextmanager
def recorded_gradients(engine: DeepSpeedEngine) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that the next step fills with its gathered gradients, before clipping."""
    gradients: dict[str, Tensor] = {}
    model, graphed = engine.module, engine._graphed
    stepping, name = (engine._engine, "step") if graphed is None else (graphed, "_update")
    step = getattr(stepping, name)

    def look_and_step(*args: Tensor) -> None:
        if graphed is not None or engine._engine.is_gradient_accumulation_boundary():
            gradients.update(whole(model, {name: engine.gradient(p) for name, p in model.named_parameters()}))
        step(*args)

    with mock.patch.object(stepping, name, look_and_step):
        yield gradients


def start_from_weights(config: Config, path: Path) -> dict[str, bool]:
    """Load initial weights from what ``save_after_training`` wrote; return facts that must all be true."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        load_initial_weights(engine, path)
        # not engine.state(), which clears moments before the first step
        moments = [engine._zero.read(p, moment) for p in engine.module.parameters() for moment in MOMENTS]
        reader = StateReader(path)
        facts = {
            "weights are loaded": all(
                torch.equal(reader.read(key), tensor) for key, tensor in engine.state().items() if "model." in key
            ),
            "moments are zero": not any(moment.any() for moment in moments),
            "step count is zero": engine.optimizer_step() == 0,
        }
        engine.destroy()
    return facts


def training_facts(config: Config, seed_checkpoint: Path, steps: int = 5, break_norms: bool = False) -> dict | None:
    """Return facts of a training run, on rank 0.

    They are the initial weights and, starting from the seed checkpoint, every gradient of the first step, losses,
    gradient norms and final weights.
    """
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        model = engine.module
        facts: dict = {"initial": whole(model, master_weights(engine))}
        for module in model.modules():
            if isinstance(module, MosaHeads):
                module.records_selection = True
            if break_norms and isinstance(module, SequenceParallelLayerNorm | SequenceParallelRMSNorm):
                module.sums_gradients = False
        read_state(engine, seed_checkpoint, optimizer_step=0)

        (batch,) = micro_batches(config, layout, 0)
        with recorded_gradients(engine) as facts["gradients"]:
            # Adam's first step has the size of the learning rate even where a gradient is only rounding: keep it small.
            facts["first_norm"] = engine.train_step([batch], 2.5e-4).grad_norm
        facts["margin"] = selection_margin(model, batch)
        results = [engine.train_step(micro_batches(config, layout, step), 1e-3) for step in range(1, steps)]
        facts["losses"] = [result.loss for result in results]
        facts["norms"] = [result.grad_norm for result in results]
        facts["final"] = whole(model, master_weights(engine))
        facts["validation"] = engine.evaluate(micro_batches(config, layout, 99))
        engine.destroy()
    return facts if layout.rank == 0 else None


def engine_losses(config: Config, steps: int) -> tuple[list[float], list[float]]:
    """Return losses and gradient norms of ``steps`` steps of the engine, with gradient accumulation."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        results = [engine.train_step(micro_batches(config, layout, step), RATES[step % 2]) for step in range(steps)]
        engine.destroy()
    return [result.loss for result in results], [result.grad_norm for result in results]


def token_losses(model: torch.nn.Module, batch: Batch, layout: Layout) -> Tensor:
    """Return the loss of every token, fp32 [B, T], ignoring the mask."""
    tokens, labels = batch["tokens"].to(layout.device), batch["labels"].to(layout.device)
    starts = batch.get("document_starts")
    documents = None if starts is None else Documents.from_starts(starts, layout.device)
    positions = torch.arange(tokens.shape[1], device=layout.device).expand_as(tokens)
    return model(tokens, positions, documents, labels=labels).float()


def plain_losses(config: Config, steps: int) -> tuple[list[float], list[float]]:
    """Return the same as ``engine_losses``, from plain PyTorch on the whole batch."""
    with parallel(config) as layout:
        model = build_model(config, VOCAB_SIZE).to(layout.device)
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        options = config.optimizer
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
        )
        losses, norms = [], []
        for step in range(steps):
            batch = global_batch(config, step)
            loss = token_losses(model, batch, layout)[batch["loss_mask"] == 1].mean()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clipping)))
            for group in optimizer.param_groups:
                group["lr"] = RATES[step % 2]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    return losses, norms


def save_megatron_checkpoint(config: Config, path: str) -> Tensor:
    """Write the initial model with Megatron's dist_checkpointing; return its logits, [B, T, V]."""
    with parallel(config) as layout:
        model = build_model(config, VOCAB_SIZE)
        if layout.rank == 0:
            Path(path).mkdir()
        dist.barrier()
        dist_checkpointing.save(_without_extra_state(model.sharded_state_dict()), path)
        return logits(model, config)


def load_megatron_checkpoint(config: Config, path: str) -> Tensor:
    """Load it into a model with other weights; return its logits."""
    config.run.seed += 1
    with parallel(config):
        model = build_model(config, VOCAB_SIZE)
        before = logits(model, config)
        state = dist_checkpointing.load(_without_extra_state(model.sharded_state_dict()), path)
        model.load_state_dict(state, strict=False)
        after = logits(model, config)
        assert not torch.equal(before, after)
        return after


def _without_extra_state(sharded: dict) -> dict:
    return {key: value for key, value in sharded.items() if not key.endswith("_extra_state")}


@torch.no_grad()
def logits(model: torch.nn.Module, config: Config) -> Tensor:
    """Return the logits of a fixed batch, gathered over the vocabulary."""
    tokens = global_batch(config, 7)["tokens"]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None, runtime_gather_output=True).clone()


def losses_after_loading(config: Config, before: int, after: int) -> tuple[list[float], list[float]]:
    """Return the losses after ``before`` steps, in the same engine and in a new one that loads its state."""
    with parallel(config) as layout:

        def train(engine: DeepSpeedEngine, steps: range) -> list[float]:
            return [engine.train_step(micro_batches(config, layout, step), 1e-3).loss for step in steps]

        first = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        train(first, range(before))
        state, count = first.state(), first.optimizer_step()  # a copy: later steps must not change it
        straight = train(first, range(before, before + after))
        config.run.seed += 1  # other initial weights, which the state must replace
        second = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        second.load_state(state, count)
        resumed = train(second, range(before, before + after))
        first.destroy()
        second.destroy()
    return straight, resumed


def nan_loss_on_last_rank(layout: Layout) -> contextlib.AbstractContextManager[object]:
    """Return a context in which losses are NaN on the last data-parallel rank only."""
    if layout.data_parallel_rank < layout.data_parallel_size - 1:
        return contextlib.nullcontext()
    loss = deepspeed_engine.language_model_loss

    def poisoned(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        loss_sum, tokens = loss(*args, **kwargs)
        return loss_sum * torch.nan, tokens

    return mock.patch.object(deepspeed_engine, "language_model_loss", poisoned)


def nan_step(config: Config) -> dict:
    """Return whether a step with a NaN on the last rank changed weights or moments, and the loss of the next step."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        engine.train_step(micro_batches(config, layout, 0), 1e-3)
        before = {key: tensor.clone() for key, tensor in engine.state().items()}
        with nan_loss_on_last_rank(layout):
            norm = engine.train_step(micro_batches(config, layout, 1), 1e-3).grad_norm
        after = engine.state()
        facts = {
            "unchanged": all(torch.equal(before[key], after[key]) for key in before),
            "norm_is_finite": math.isfinite(norm),
            "optimizer_step": engine.optimizer_step(),
            "next_loss": engine.train_step(micro_batches(config, layout, 2), 1e-3).loss,
        }
        engine.destroy()
    return facts


def with_fake_apex(task: Callable[..., Any], *args: Any) -> Any:
    """Run a task with a stand-in for apex's optimizer."""
    with mock.patch.object(optimizer, "apex_fused_adam", lambda: FakeFusedAdam):
        return task(*args)


def optimizer_name(config: Config) -> str:
    """Return the class name of the engine's optimizer."""
    with parallel(config) as layout:
        engine = DeepSpeedEngine(config, VOCAB_SIZE, layout)
        engine.destroy()
    return type(engine._optimizer).__name__
