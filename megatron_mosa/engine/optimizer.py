"""AdamW for DeepSpeed, with the gradient clipping that DeepSpeed lacks under ZeRO-0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from megatron_mosa.config import Config
from megatron_mosa.parallel import apex_fused_adam, partition_of, tensor_parallel_group

MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices but not on norms: NVIDIA apex's or torch's, fused on GPUs."""
    options, parallel = config.optimizer, config.parallel
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if is_matrix(p)], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if not is_matrix(p)], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.beta1, options.beta2),
        "eps": options.epsilon,
    }
    # FusedAdam counts steps per group, but ZeRO-3 steps a group in several parts.
    may_use_apex = config.train.apex != "never" and parallel.zero_stage < 3 and not parallel.offload_optimizer
    kind = apex_fused_adam() if may_use_apex else None
    if kind is None:
        kind = torch.optim.AdamW
        settings["fused"] = torch.cuda.is_available() and not parallel.offload_optimizer
    if parallel.zero_stage == 0:
        clipping: Any = type(f"Clipping{kind.__name__}", (GradientClipping, kind), {})
        return clipping(groups, max_norm=options.gradient_clipping, **settings)
    return kind(groups, **settings)


def is_matrix(parameter: torch.nn.Parameter) -> bool:
    """Return whether a parameter has two dimensions or more, also if ZeRO-3 has partitioned it."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1


def step_count(optimizer: torch.optim.Optimizer, tensor: Tensor) -> int:
    """Return the number of Adam steps of ``tensor``; 0 before it has any state."""
    state = optimizer.state.get(tensor)
    if not state:
        return 0
    return int(state["step"] if "step" in state else _group_of(optimizer, tensor)["step"])


def set_state(optimizer: torch.optim.Optimizer, tensor: Tensor, moments: dict[str, Tensor], step: int) -> None:
    """Set Adam's state of ``tensor``, which the first step would otherwise create."""
    state = optimizer.state[tensor]
    state.update(moments)
    if isinstance(optimizer, torch.optim.AdamW):
        device = tensor.device if optimizer.defaults["fused"] else torch.device("cpu")
        state["step"] = torch.tensor(float(step), device=device)
    else:
        _group_of(optimizer, tensor)["step"] = step


@torch.no_grad()
def adamw_step(
    weights: Tensor,
    rounded: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: Tensor,
    scale: Tensor,
    is_finite: Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """AdamW on flat tensors, clipping and the copy in bf16 included: compiled, one pass over memory.

    Args:
        weights, gradient, exp_avg, exp_avg_sq: fp32 [N].
        rounded: bf16 [N], the weights that the model computes with.
        step: how often this was done, an fp32 scalar.
        learning_rate, scale: fp32 scalars; gradients are multiplied by ``scale``.
        is_finite: a bool scalar; False: nothing changes.
    """
    gradient = gradient * scale
    count = step + 1
    mean = exp_avg.lerp(gradient, 1 - beta1)
    mean_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
    size = learning_rate / (1 - beta1**count)
    root = (mean_sq / (1 - beta2**count)).sqrt()
    stepped = weights * (1 - learning_rate * weight_decay) - size * mean / (root + epsilon)
    for old, new in ((step, count), (exp_avg, mean), (exp_avg_sq, mean_sq), (weights, stepped)):
        old.copy_(torch.where(is_finite, new, old))
    rounded.copy_(weights)


def _group_of(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(tensor is other for other in group["params"]))


class GradientClipping(torch.optim.Optimizer):
    """Mixin for an optimizer: clips by the global norm, and skips steps whose norm is not finite.

    DeepSpeed does both under ZeRO 1 to 3; under 0 in fp32 it reports no norm and steps with NaN gradients.
    """

    def __init__(self, params: Any, max_norm: float, **settings: Any) -> None:
        super().__init__(params, **settings)  # the optimizer's, which follows in the order of base classes
        self.max_norm = max_norm
        self._global_grad_norm = 0.0  # DeepSpeed reads this attribute

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Clip and step; if the norm is not finite, which all ranks see alike, drop the gradients instead."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = global_norm(parameters)
        self._global_grad_norm = norm.item()
        if not norm.isfinite():
            self.zero_grad()
            return None
        if self.max_norm > 0:
            scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([p.grad for p in parameters], scale)
        return super().step(closure)


def global_norm(parameters: list[Tensor]) -> Tensor:
    """Return the gradient norm over the tensor-parallel group, counting replicated parameters once."""
    group = tensor_parallel_group()
    counted = [p for p in parameters if partition_of(p) is not None or group.rank() == 0]
    square = torch.stack(torch._foreach_norm([p.grad for p in counted if p.grad is not None])).square().sum()
    distributed.all_reduce(square, group=group)
    return square.sqrt()
