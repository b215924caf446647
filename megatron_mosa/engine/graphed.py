"""Optimizer steps under ZeRO-1 in bf16 whose micro-batches are one CUDA graph each.

DeepSpeed's optimizer keeps weights and fp32 gradients in flat buffers whose addresses never change, which is what makes
graphs possible. Its engine calls nothing here: its hooks would wait for the device, and round gradients to bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle

from megatron_mosa.engine.optimizer import MOMENTS, adamw_step, set_state
from megatron_mosa.engine.protocol import Batch
from megatron_mosa.kernels import KernelBackend, naive
from megatron_mosa.parallel import data_parallel_group, partition_of, tensor_parallel_group

WARM_UPS = 2  # micro-batches that run as they are before one is captured: the first compiles


@dataclass
class _Captured:
    """Input buffers of a micro-batch, [B, T] each, and the graph that reads them, once captured."""

    key: Hashable
    inputs: Batch
    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class GraphedSteps:
    """Takes optimizer steps over any number of micro-batches without waiting for the device.

    The current stream must not be the default one, and must have been current since before the model was built:
    autograd's nodes that accumulate gradients belong to the stream they were made on, and a capture refuses any other.

    Args:
        optimizer: DeepSpeed's BF16_Optimizer around torch's AdamW.
        loss: returns the loss of a micro-batch, summed over its tokens; must not wait for the device.
        max_norm: limit for the norm of the gradients; 0: no clipping.
        kernels: the backend that accumulates gradients.
    """

    def __init__(
        self, optimizer: Any, loss: Callable[[Batch], Tensor], max_norm: float, kernels: KernelBackend = naive
    ) -> None:
        self.optimizer = optimizer
        self.loss = loss
        self.max_norm = max_norm
        self.kernels = kernels
        self.group = data_parallel_group()
        self.flat_gradients: list[Tensor] = optimizer.fp32_groups_gradients_flat
        self.partitions: list[Tensor] = optimizer.fp32_groups_gradient_flat_partition  # views of these
        device = self.flat_gradients[0].device
        self.scale, self.total, self.learning_rate = torch.zeros(3, device=device).unbind()
        self._captured: _Captured | None = None
        self._adamw_step = torch.compile(adamw_step, dynamic=False) if device.type == "cuda" else adamw_step
        self._totals: dict[torch.nn.Parameter, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                self._totals[parameter] = gradient.view_as(parameter)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._move_gradient))
        self._left: dict[torch.nn.Parameter, Tensor] = {}  # whose gradients this backward pass has not reached
        # Of a step's first micro-batch: its gradients replace those of the last step, which nothing has to clear then.
        self._is_first = torch.zeros((), dtype=torch.bool, device=device)

    def take(
        self, micro_batches: list[Batch], counted: Tensor, learning_rate: float, phase: Hashable
    ) -> tuple[Tensor, Tensor]:
        """Take one step on the mean loss; weights stay as they are where the gradients' norm is not finite.

        Args:
            micro_batches: this rank's micro-batches.
            counted: number of tokens of the global batch that count.
            learning_rate: the learning rate of all parameters.
            phase: everything besides tensors that the loss depends on; a change captures a new graph.

        Returns:
            The mean loss over the global batch and the norm of the gradients, on the device.
        """
        self.scale.copy_(counted.reciprocal())
        self.total.zero_()
        for number, batch in enumerate(micro_batches):
            self._is_first.fill_(number == 0)
            self._add(batch, phase)
        self.learning_rate.fill_(learning_rate)
        total = self.total.clone()
        if self.group.size() > 1:
            dist.all_reduce(total, group=self.group)
        norm = self._reduce()
        self._update(norm)
        return total, norm

    def _add(self, batch: Batch, phase: Hashable) -> None:
        """Add a micro-batch's loss and gradients."""
        key = phase, *((name, tensor.shape) for name, tensor in batch.items())
        if self._captured is None or self._captured.key != key:
            self.release()
            inputs = {name: torch.empty_like(tensor, device=self.scale.device) for name, tensor in batch.items()}
            self._captured = _Captured(key, inputs)
        captured = self._captured
        for name, tensor in captured.inputs.items():
            tensor.copy_(batch[name], non_blocking=True)
        if captured.runs < WARM_UPS:
            self._run(captured.inputs)
            captured.runs += 1
            return
        if captured.graph is None:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            # Other threads, of checkpoints for instance, may call what no capture allows.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._run(captured.inputs)
            captured.graph = graph
        captured.graph.replay()

    def close(self) -> None:
        """Free the graph and take the hooks off the parameters, after the last step.

        Python's garbage collector does not see what a parameter's hooks refer to: with them, neither the parameters nor
        this object and what it refers to, such as the optimizer's state, would ever be freed.
        """
        self.release()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def release(self) -> None:
        """Free the graph, if there is one, and its memory.

        NCCL would wait forever for a communicator to be destroyed that a graph still refers to.
        """
        if self._captured is not None:
            self._captured = None  # and its graph
            torch.cuda.empty_cache()  # what the graph held would lie beside the memory of the next

    def _run(self, inputs: Batch) -> None:
        self._left = dict(self._totals)
        loss = self.loss(inputs) * self.scale
        loss.backward()
        self.total += loss.detach()
        for total in self._left.values():
            total.masked_fill_(self._is_first, 0.0)

    @torch.no_grad()
    def _move_gradient(self, parameter: torch.nn.Parameter) -> None:
        total, gradient = self._left.pop(parameter), parameter.grad
        assert gradient is not None
        self.kernels.accumulate(total, gradient, self._is_first)
        # Else autograd would add the next gradient to this one: in a graph, to memory that others use by then.
        parameter.grad = None

    def _reduce(self) -> Tensor:
        """Sum the gradients over the data-parallel ranks, each rank its partition; the norm of the whole."""
        if self.group.size() > 1:
            for flat, partition in zip(self.flat_gradients, self.partitions, strict=True):
                if dist.get_backend(self.group) == "nccl":
                    dist.reduce_scatter_tensor(partition, flat, group=self.group)
                else:
                    dist.all_reduce(flat, group=self.group)
        is_counted = [self._is_counted(group) for group in self.optimizer.bf16_groups]
        counted = [partition for partition, is_here in zip(self.partitions, is_counted, strict=True) if is_here]
        squares = torch.stack([torch.linalg.vector_norm(partition) for partition in counted]).square().sum()
        for group in (self.group, tensor_parallel_group()):
            if group.size() > 1:
                dist.all_reduce(squares, group=group)
        return squares.sqrt()

    def _is_counted(self, parameters: list[torch.nn.Parameter]) -> bool:
        """Return whether the norm counts a group on this rank: replicated parameters count on one rank only."""
        is_split = {partition_of(parameter) is not None for parameter in parameters}
        assert len(is_split) == 1, "an optimizer group has parameters of both kinds"
        return is_split.pop() or tensor_parallel_group().rank() == 0

    def _update(self, norm: Tensor) -> None:
        """Clip, step, and hand the weights to the model."""
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_norm > 0 else torch.ones_like(norm)
        is_finite, adamw = norm.isfinite(), self.optimizer.optimizer
        rank = dist.get_rank(self.group)
        for number, group in enumerate(adamw.param_groups):
            weights = self.optimizer.fp32_groups_flat_partition[number]
            if weights not in adamw.state:
                set_state(adamw, weights, {moment: torch.zeros_like(weights) for moment in MOMENTS}, 0)
            state, (beta1, beta2) = adamw.state[weights], group["betas"]
            self._adamw_step(
                weights.detach(), self.optimizer.bf16_partitioned_groups[number][rank], self.partitions[number],
                state["exp_avg"], state["exp_avg_sq"], state["step"], self.learning_rate, scale, is_finite,
                beta1, beta2, group["eps"], group["weight_decay"],
            )  # fmt: skip
        if self.group.size() > 1:
            self.optimizer.update_lp_params()
