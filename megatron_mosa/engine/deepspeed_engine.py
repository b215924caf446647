"""The Megatron-core model under a DeepSpeed ZeRO engine."""

from __future__ import annotations

import importlib
import io
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import cached_property
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor
from torch import distributed as dist

from megatron_mosa.attention import (
    MosaTransformerLayer,
    forget_scores,
    mosa_layers,
    selection_buffers,
    update_thresholds,
)
from megatron_mosa.config import Config
from megatron_mosa.engine.acceleration import choose_acceleration
from megatron_mosa.engine.flat_buffers import Storage, WholeGradients
from megatron_mosa.engine.graphed import GraphedSteps
from megatron_mosa.engine.optimizer import MOMENTS, adamw, is_matrix, set_state, step_count
from megatron_mosa.engine.protocol import Batch, CopyToHost, StepResult, to_host
from megatron_mosa.engine.sharded import ShardedLayers
from megatron_mosa.engine.zero_state import fill, zero_state
from megatron_mosa.kernels import Documents, KernelBackend, PackedDocuments, get_backend
from megatron_mosa.model import MosaGPTModel, build_empty_model, draw_state, initial_weights, language_model_loss
from megatron_mosa.parallel import Layout, ModelParallelUnit, data_parallel_group

_KEYS: dict[str, str | None] = {"model": None} | {moment: moment for moment in MOMENTS}


class DeepSpeedEngine:
    """Builds and trains the model, and gives access to its state under names and shapes that do not depend on ZeRO.

    Implements ``TrainingEngine``. Parameters are fp32, or bf16 with fp32 master weights and fp32 gradient
    accumulation. ZeRO partitions optimizer state (1), gradients (2) and parameters (3) over the data-parallel group.
    """

    def __init__(self, config: Config, vocab_size: int, layout: Layout) -> None:
        _silence_deepspeed()
        self.layout = layout
        self.accumulation_steps = config.train.global_batch_size // (
            config.train.micro_batch_size * layout.data_parallel_size
        )
        self.acceleration = choose_acceleration(config, layout)
        compiler = load_compiler() if self.acceleration.compiles_layers else None
        if self.acceleration.uses_graphs:
            torch.cuda.set_stream(torch.cuda.Stream(layout.device))  # type: ignore[arg-type]  # see GraphedSteps
        settings = self._settings(config)
        stage = settings["zero_optimization"]["stage"]
        with _partitioned_construction(settings):
            model = build_empty_model(config, vocab_size)
        _initialize(model, config, stage, layout.device)
        draw_state(model, config.run.seed)
        _reject_unsummed_gradients(model)
        settings["zero_optimization"] |= _sizes(model, stage)
        if stage == 3:
            # Weights of a layer are gathered as a whole, in one collective. Within a layer, recompute could not do it,
            # nor a compiled layer, which does not call its modules.
            set_z3_leaf_modules(model, [MosaTransformerLayer])
        self._optimizer = adamw(model, config)
        with redirect_stdout(io.StringIO()):  # DeepSpeed's bf16 optimizer prints memory reports
            self._engine: Any = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=settings, mpu=ModelParallelUnit()
            )[0]
        _move_buffers(model, layout.device)
        self._zero = zero_state(self._engine)
        self._graphed: GraphedSteps | None = None
        if compiler is not None:
            compiler.join()  # its modules import each other in circles, which two threads at once may not survive
            kernels = get_backend("triton", next(model.parameters()), config.model.head_dim)
            model.compile_layers(kernels, overlaps=self.acceleration.overlaps)
            if stage == 3:
                deepspeed.zero.register_external_parameter(model.output_loss, model.vocabulary_layer.weight)
            if self.acceleration.uses_graphs:
                storage = _storage(self._engine.optimizer, model, config.parallel.zero_stage, kernels)
                clipping = config.optimizer.gradient_clipping
                self._graphed = GraphedSteps(storage, self._optimizer, self._loss_in_graph, clipping)

    def _settings(self, config: Config) -> dict[str, Any]:
        stage = config.parallel.zero_stage
        if stage == 2 and self.acceleration.uses_graphs:
            stage = 3  # see ShardedLayers, which keeps the weights whole
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = config.model.hidden_size  # only norms stay whole
            # True would copy gradients to a buffer, from which a reduction of several parameters copies them once more.
            zero["contiguous_gradients"] = False
            # True would replace torch's linear, for the whole process, with one that is compiled anew for each layer.
            zero["memory_efficient_linear"] = False
        if config.parallel.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        return {
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation_steps,
            # Under stage 0, GradientClipping does it.
            "gradient_clipping": config.optimizer.gradient_clipping if config.parallel.zero_stage else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,  # DeepSpeed does not recognize every import of apex's
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also steps offloaded state, without compiling
            "bf16": {"enabled": config.train.precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 10**9,
            "timers": {"throughput": {"enabled": False}},  # it synchronizes twice per micro-batch
        }

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    @cached_property
    def _mosa_heads(self) -> list[Any]:
        """``mosa_layers``, found once: the device would wait in each step while the host walks through all modules."""
        return mosa_layers(self.module)

    @cached_property
    def _has_selection_state(self) -> bool:
        """Whether ``update_thresholds`` has anything to do; found once, as above."""
        return bool(selection_buffers(self.module))

    def train_step(self, batches: Iterable[Batch], learning_rate: float) -> StepResult:
        """Take one optimizer step over ``accumulation_steps`` micro-batches ([B, T] each), all held at once.

        The loss is the mean over all counted tokens of the global batch, so it does not depend on how the batch is
        split over ranks and micro-batches. If no token counts, the loss is NaN, the step is skipped and the result's
        ``is_empty`` is set.

        Raises:
            ValueError: there are more or fewer micro-batches.
        """
        micro_batches = list(batches)
        if len(micro_batches) != self.accumulation_steps:
            raise ValueError(f"a step takes {self.accumulation_steps} micro-batches, got {len(micro_batches)}")
        if not self._engine.training:
            self._engine.train()
        counted = self._counted_tokens(micro_batches)
        if self._graphed is not None:
            selects_above = any(heads.selects_above(training=True) for heads in self._mosa_heads)
            fixed = [self._in_fixed_shapes(batch) for batch in micro_batches]
            total, norm = self._graphed.take(fixed, counted, learning_rate, selects_above)
        else:
            for group in self._engine.optimizer.param_groups:
                group["lr"] = learning_rate
            total, norm = self._deepspeed_step(micro_batches, counted)
        self._record_selection(micro_batches[-1])
        # This waits for the device: in a step of CUDA graphs, the only time.
        mean, count, norm = torch.stack((total.double(), counted, norm.double())).tolist()
        result = StepResult(loss=mean, grad_norm=norm, is_empty=count == 0)
        if not self._has_selection_state:
            return result
        if result.is_finite:
            update_thresholds(self.module, data_parallel_group())
        else:
            forget_scores(self.module)
        return result

    def _deepspeed_step(self, micro_batches: list[Batch], counted: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step with DeepSpeed's engine; return the mean loss and the gradient norm, on the device."""
        # DeepSpeed averages over micro-batches and data-parallel ranks. Where every token counts, this is exact.
        parts = self.accumulation_steps * self.layout.data_parallel_size
        tokens = (counted / parts).float()
        total = torch.zeros((), device=self.layout.device)
        for batch in micro_batches:
            loss = self._loss(self._engine, batch)[0] / tokens
            self._engine.backward(loss)
            self._engine.step()
            total += loss.detach()
        dist.all_reduce(total, group=data_parallel_group())
        norm = self._engine.get_global_grad_norm()
        return total / parts, torch.as_tensor(norm, dtype=torch.float64, device=self.layout.device)

    def _record_selection(self, batch: Batch) -> None:
        """If the selection is to be recorded but layers are compiled, which record none, select once more.

        In one sequence, whose scores compiled layers keep.
        """
        if not self.acceleration.compiles_layers:
            return
        starts = batch.get("document_starts")
        documents = None if starts is None else Documents.from_starts(starts[:1], self.layout.device)
        for heads in self._mosa_heads:
            if heads.records_selection:
                heads.record_kept(documents)

    def _in_fixed_shapes(self, batch: Batch) -> Batch:
        """Return a batch whose tensors have the same shapes in most batches, for a graph."""
        if "document_starts" not in batch:
            return batch
        packed = self._engine.module.pack(Documents.from_starts(batch["document_starts"]))
        return batch | {"cu_seqlens": packed.cu_seqlens}

    def _loss_in_graph(self, batch: Batch) -> Tensor:
        documents = None
        if "cu_seqlens" in batch:
            starts = batch["document_starts"]
            documents = PackedDocuments(starts, batch["cu_seqlens"], starts.shape[1])
        inputs = {name: batch[name] for name in ("tokens", "labels", "loss_mask")}
        return language_model_loss(self.module.forward, **inputs, documents=documents)[0]

    def _counted_tokens(self, micro_batches: list[Batch]) -> Tensor:
        """Return the number of tokens of the global batch that count, fp64 on the device."""
        count = sum(_sum(batch["loss_mask"]) for batch in micro_batches)
        # A number becomes a kernel's argument, where a tensor would be copied from memory that is not pinned.
        counted = torch.zeros((), dtype=torch.float64, device=self.layout.device).add_(count)
        if data_parallel_group().size() > 1:
            dist.all_reduce(counted, group=data_parallel_group())
        return counted

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean loss in nats per token. All ranks must get the same number of batches."""
        self._engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        if self._graphed is not None:
            self._graphed.prepare_evaluation()
        # Not a call, before which DeepSpeed lets parameters gather themselves.
        model = self._engine if self._graphed is None else self.module.forward
        for batch in batches:
            totals += torch.stack(self._loss(model, batch)).double()
        dist.all_reduce(totals, group=data_parallel_group())
        self._engine.train()
        return (totals[0] / totals[1]).item()

    def _loss(self, model: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        names = ("tokens", "labels", "loss_mask")
        tokens, labels, loss_mask = (batch[name].to(self.layout.device, non_blocking=True) for name in names)
        # The host reads document starts, so they stay where they are.
        return language_model_loss(model, tokens, labels, loss_mask, batch.get("document_starts"))

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        """Return this tensor-parallel rank's gradient, averaged over data-parallel ranks; between backward and step."""
        return self._zero.gradient(parameter)

    def optimizer_step(self) -> int:
        """Return the number of optimizer steps taken, on which Adam's bias correction depends."""
        return step_count(self._optimizer, self._zero.optimised_tensors()[0])

    def state(self, names: Collection[str] | None = None, copy: CopyToHost = to_host) -> dict[str, Tensor]:
        """Return this tensor-parallel rank's fp32 master weights and Adam moments, gathered over data-parallel ranks.

        Keys are ``model.NAME``, ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` with Megatron's parameter names; thresholds,
        biases and centroids of heads have only ``model.NAME``. A collective.

        Args:
            names: the parameters and buffers whose state this rank keeps; all by default.
            copy: copies each tensor to host memory, on the current stream.
        """
        if not self.optimizer_step():
            self._allocate_moments(0)
        self._zero.link()
        state = {}
        for name, parameter in self.module.named_parameters():
            for key, moment in _KEYS.items():
                tensor = self._zero.read(parameter, moment).detach()
                if names is None or name in names:
                    state[f"{key}.{name}"] = copy(f"{key}.{name}", tensor)
        for name, buffer in selection_buffers(self.module).items():
            if names is None or name in names:
                state[f"model.{name}"] = copy(f"model.{name}", buffer)
        if self.layout.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return state

    def load_state(self, state: dict[str, Tensor], optimizer_step: int) -> None:
        """Load what ``state`` returned, at any data-parallel size and ZeRO stage."""
        self._allocate_moments(optimizer_step)
        for name, parameter in self.module.named_parameters():
            for key, moment in _KEYS.items():
                self._zero.write(parameter, moment, state[f"{key}.{name}"].to(self.layout.device))
        for name, buffer in selection_buffers(self.module).items():
            buffer.copy_(state[f"model.{name}"])
        forget_scores(self.module)

    def _allocate_moments(self, optimizer_step: int) -> None:
        """Create Adam's state, which the first step would otherwise create, so that it can be read and written."""
        for tensor in self._zero.optimised_tensors():
            moments = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
            set_state(self._optimizer, tensor, moments, optimizer_step)
        self._zero.link()

    def destroy(self) -> None:
        """Free CUDA graphs and remove all hooks from the model; call it before groups are destroyed.

        After it, nothing but the caller keeps the model and the optimizer's state, except under ZeRO-3 without graphs.
        """
        if self._graphed is not None:
            self._graphed.close()
            self._graphed = None
        self._engine.destroy()


def _sum(mask: Tensor) -> Tensor | float:
    """Sum in fp64; on the host with NumPy, which spares waking up torch's threads."""
    return float(mask.numpy().sum(dtype="float64")) if mask.device.type == "cpu" else mask.sum(dtype=torch.float64)


def load_compiler() -> threading.Thread:
    """Load torch's compiler in a thread, while the model is built, and let it share Triton's cache with our kernels.

    Otherwise it sets TRITON_CACHE_DIR when it makes its first kernel. Ours are compiled before and after that, in an
    order that depends on what its own cache holds, so that a second start would not find all that the first compiled.
    """
    home = os.environ.get("TRITON_HOME", os.path.expanduser("~"))
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(home, ".triton", "cache"))
    thread = threading.Thread(target=importlib.import_module, args=("torch._inductor.compile_fx",), daemon=True)
    thread.start()
    return thread


def _partitioned_construction(settings: dict[str, Any]) -> AbstractContextManager[object]:
    """Return a context in which ZeRO-3 partitions each module's parameters as soon as it is built."""
    if settings["zero_optimization"]["stage"] != 3:
        return nullcontext()
    return deepspeed.zero.Init(
        data_parallel_group=data_parallel_group(),
        config_dict_or_path=settings,  # has the dtype, which is ignored as an argument where fp16 is not supported
        mpu=ModelParallelUnit(),
    )


def _initialize(model: MosaGPTModel, config: Config, stage: int, device: torch.device) -> None:
    """Give the model its initial weights; without ZeRO-3, where DeepSpeed will have them and in its type."""
    if stage == 3:
        for parameter, weight in initial_weights(model, config.run.seed):
            fill(parameter, weight)
        return
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    for parameter, weight in initial_weights(model, config.run.seed, dtype, device):
        parameter.data = weight  # no copy


def _sizes(model: MosaGPTModel, stage: int) -> dict[str, int]:
    """Return how many elements DeepSpeed communicates at once; its defaults fit neither small nor large models."""

    def numel(parameters: Iterable[Any]) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)

    if stage < 3:
        # Whole buckets are allocated in every step, by default 2 GB each.
        bucket = min(500_000_000, numel(model.parameters()))
        return {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    layers: list[list[Any]] = [list(layer.parameters()) for layer in model.decoder.layers]
    layer, gathered = max(map(numel, layers)), max(numel(p for p in layer if not p.ds_persist) for layer in layers)
    vocabulary, norm = numel([model.vocabulary_layer.weight]), cast(Any, model.decoder.final_layernorm).parameters()
    return {
        # The gradients of a layer are reduced while the one below computes its own.
        "reduce_bucket_size": layer,
        # The weights of a layer are gathered while another computes. Every module that is called gathers so many ahead,
        # the embedding, too, until as many are there as the second number says: the embedding and two layers.
        "stage3_prefetch_bucket_size": gathered,
        "stage3_max_live_parameters": vocabulary + 2 * gathered,
        # The last two layers are kept for their backward pass: before it come a layer, the final norm and the output
        # layer. With fewer, what is gathered for backward would displace them; with more, they displace the next layer.
        "stage3_max_reuse_distance": layer + numel(norm) + vocabulary + 1,
    }


def _storage(optimizer: Any, model: MosaGPTModel, stage: int, kernels: KernelBackend) -> Storage:
    """Return where CUDA graphs find weights and leave gradients under a ZeRO stage of the configuration."""
    if stage == 1:
        return WholeGradients(optimizer, kernels)
    embedding, output = cast(Any, model.embedding).word_embeddings, model.output_loss
    layers = [(layer, list(filter(is_matrix, layer.parameters()))) for layer in model.decoder.layers]
    modules = [(embedding, [embedding.weight]), *layers, (output, [model.vocabulary_layer.weight])]
    return ShardedLayers(optimizer, cast(Any, modules), stage == 2, kernels)


def _move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Move buffers to the device, which DeepSpeed does not do under ZeRO-3."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _reject_unsummed_gradients(model: torch.nn.Module) -> None:
    # Megatron sums the gradients of tagged parameters in finalize_model_grads, which DeepSpeed does not call.
    tagged = [name for name, p in model.named_parameters() if getattr(p, "sequence_parallel", False)]
    if tagged:
        raise ValueError(
            f"gradients of {tagged[0]} and {len(tagged) - 1} more would not be summed over the tensor-parallel group "
            "under DeepSpeed; build the model with MosaSpecProvider, whose norms sum their own gradients"
        )


def _silence_deepspeed() -> None:
    deepspeed_logger.setLevel(logging.WARNING)
    # On CPU, DeepSpeed would silently spend 35 s at the first start on compiling an all-reduce for inference, which
    # training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
