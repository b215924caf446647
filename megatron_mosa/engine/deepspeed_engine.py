"""The Megatron-core model under a DeepSpeed ZeRO engine."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor
from torch import distributed as dist

from megatron_mosa.config import Config
from megatron_mosa.engine.protocol import Batch, StepResult
from megatron_mosa.model import language_model_loss
from megatron_mosa.parallel import Layout, ModelParallelUnit, data_parallel_group

MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """Steps, evaluates and hands out its state under names and shapes that know nothing of ZeRO.

    Implements ``TrainingEngine``. Parameters are fp32, or bf16 with fp32 master weights and fp32 gradient
    accumulation. Optimizer state is partitioned over the data-parallel group.
    """

    def __init__(self, model: torch.nn.Module, config: Config, layout: Layout) -> None:
        _refuse_unsummed_gradients(model)
        _quieten()
        self.layout = layout
        self.accumulation_steps = config.train.global_batch_size // (
            config.train.micro_batch_size * layout.data_parallel_size
        )
        with redirect_stdout(io.StringIO()):  # DeepSpeed's bf16 optimizer prints memory reports
            self._engine: Any = deepspeed.initialize(
                model=model,
                optimizer=_adamw(model, config),
                config=self._deepspeed_config(config, sum(p.numel() for p in model.parameters())),
                mpu=ModelParallelUnit(),
            )[0]

    def _deepspeed_config(self, config: Config, num_parameters: int) -> dict[str, Any]:
        # DeepSpeed allocates its buckets whole in every step, 2 GB each by default: no larger than the model.
        bucket = min(500_000_000, num_parameters)
        return {
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "gradient_accumulation_steps": self.accumulation_steps,
            "gradient_clipping": config.optimizer.gradient_clipping,
            "zero_optimization": {
                "stage": config.parallel.zero_stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
            },
            "bf16": {"enabled": config.train.precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 10**9,
        }

    @property
    def module(self) -> torch.nn.Module:
        """The model."""
        return self._engine.module

    def train_step(self, batches: Iterable[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over ``accumulation_steps`` micro-batches ([B, T] each).

        The loss is the mean over the micro-batches of all data-parallel ranks.
        """
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), device=self.layout.device)
        for batch in batches:
            loss_sum, tokens = self._loss(self._engine, batch)
            loss = loss_sum / tokens
            self._engine.backward(loss)
            self._engine.step()
            total += loss.detach()
        dist.all_reduce(total, group=data_parallel_group())
        mean = total / (self.accumulation_steps * self.layout.data_parallel_size)
        return StepResult(loss=mean.item(), grad_norm=float(self._engine.get_global_grad_norm()))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss in nats per token over batches that all ranks see in equal number."""
        self._engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.layout.device)
        for batch in batches:
            totals += torch.stack(self._loss(self.module, batch)).double()
        dist.all_reduce(totals, group=data_parallel_group())
        self._engine.train()
        return (totals[0] / totals[1]).item()

    def _loss(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        tensors = {name: tensor.to(self.layout.device, non_blocking=True) for name, tensor in batch.items()}
        return language_model_loss(model, tensors["tokens"], tensors["labels"], tensors["loss_mask"])

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor:
        """This tensor-parallel rank's whole gradient, averaged over data-parallel ranks; between backward and step."""
        return cast(Tensor, safe_get_full_grad(parameter))

    def optimizer_step(self) -> int:
        """How many times the optimizer has stepped (Adam's bias correction counts from it)."""
        states = [self._base_optimizer.state[flat] for flat in self._flat_partitions]
        return int(states[0]["step"]) if states[0] else 0

    def state(self) -> dict[str, Tensor]:
        """fp32 master weights and Adam moments of this tensor-parallel rank, whole over data-parallel ranks.

        Keys: ``model.NAME``, ``exp_avg.NAME``, ``exp_avg_sq.NAME``, with Megatron's parameter names. A collective:
        every rank must call it. The tensors are on the CPU.
        """
        if not self.optimizer_step():
            self._allocate_moments(0)
        self._link_moments()
        state = {}
        for name, parameter in self.module.named_parameters():
            state[f"model.{name}"] = _on_cpu(safe_get_full_fp32_param(parameter))
            for moment in MOMENTS:
                state[f"{moment}.{name}"] = _on_cpu(safe_get_full_optimizer_state(parameter, moment))
        return state

    def load_state(self, state: dict[str, Tensor], optimizer_step: int) -> None:
        """Take over what ``state`` returned, on whatever data-parallel size it was saved."""
        self._allocate_moments(optimizer_step)
        for name, parameter in self.module.named_parameters():
            master = state[f"model.{name}"].to(self.layout.device)
            parameter.data.copy_(master)
            safe_set_full_fp32_param(parameter, master)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{moment}.{name}"].to(self.layout.device), moment)

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer.optimizer

    @property
    def _flat_partitions(self) -> list[Tensor]:
        return [group["params"][0] for group in self._base_optimizer.param_groups]

    def _allocate_moments(self, optimizer_step: int) -> None:
        """Create Adam's state, which DeepSpeed otherwise creates in the first step, so that it can be filled."""
        for flat in self._flat_partitions:
            state = self._base_optimizer.state[flat]
            state.update({moment: torch.zeros_like(flat) for moment in MOMENTS})
            device = flat.device if self._base_optimizer.defaults["fused"] else torch.device("cpu")
            state["step"] = torch.tensor(float(optimizer_step), device=device)
        self._link_moments()

    def _link_moments(self) -> None:
        """Let DeepSpeed's parameter views see the moments; it links them after the first group's first step only."""
        self._engine.optimizer._hp_optimizer_states_linked = False
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def destroy(self) -> None:
        """Release DeepSpeed's hooks."""
        self._engine.destroy()


def _adamw(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on norms; fused on GPUs."""
    options = config.optimizer
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=torch.cuda.is_available(),
    )


def _refuse_unsummed_gradients(model: torch.nn.Module) -> None:
    # Megatron tags such parameters and sums their gradients in finalize_model_grads, which DeepSpeed does not run.
    tagged = [name for name, p in model.named_parameters() if getattr(p, "sequence_parallel", False)]
    if tagged:
        raise ValueError(
            f"gradients of {tagged[0]} and {len(tagged) - 1} more would not be summed over the tensor-parallel group "
            "under DeepSpeed; build the model with MosaSpecProvider, whose norms sum their own"
        )


def _on_cpu(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # DeepSpeed has none for parameters that it does not optimise: there are none
    return tensor.detach().to("cpu", torch.float32)


def _quieten() -> None:
    deepspeed_logger.setLevel(logging.WARNING)
    # On CPU DeepSpeed would compile a C++ all-reduce for inference at first start, 35 s in silence. Training never
    # calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
