"""Optimizer steps under ZeRO-1 in bf16 whose micro-batches are one CUDA graph each.

DeepSpeed's optimizer keeps weights and fp32 gradients in flat buffers whose addresses never change, which is what makes
graphs possible. Its engine calls nothing here: its hooks would wait for the device, and round gradients to bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_mosa.engine.protocol import Batch
from megatron_mosa.parallel import data_parallel_group

WARM_UPS = 2  # micro-batches that run as they are before one is captured: the first compiles


@dataclass
class _Captured:
    """The inputs of a graph, [B, T] each at fixed addresses, and the graph, once there is one."""

    key: Hashable
    inputs: Batch
    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class GraphedSteps:
    """Takes optimizer steps of any number of micro-batches, without a decision on the host.

    The current stream must not be the default one, and must have been current since before the model was built:
    autograd's nodes that accumulate gradients belong to the stream they were made on, and a capture refuses any other.

    Args:
        optimizer: DeepSpeed's BF16_Optimizer around torch's fused AdamW.
        loss: of a micro-batch, summed over its tokens; a function of its inputs that never waits for the device.
        max_norm: of the gradients; 0: they are not clipped.
    """

    def __init__(self, optimizer: Any, loss: Callable[[Batch], Tensor], max_norm: float) -> None:
        self.optimizer = optimizer
        self.loss = loss
        self.max_norm = max_norm
        self.group = data_parallel_group()
        self.flat_gradients: list[Tensor] = optimizer.fp32_groups_gradients_flat
        self.partitions: list[Tensor] = optimizer.fp32_groups_gradient_flat_partition  # views of these
        self.scale, self.total = torch.zeros(2, device=self.flat_gradients[0].device).unbind()
        self._captured: _Captured | None = None
        for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.register_post_accumulate_grad_hook(partial(_move_gradient, gradient.view_as(parameter)))
        for weights, gradient in zip(optimizer.fp32_groups_flat_partition, self.partitions, strict=True):
            weights.grad = gradient

    def take(self, micro_batches: list[Batch], counted: Tensor, phase: Hashable) -> tuple[Tensor, Tensor]:
        """Take one step on the mean loss; weights stay as they are where the gradients' norm is not finite.

        Args:
            micro_batches: of this rank.
            counted: how many tokens count in the global batch.
            phase: whatever else the loss depends on but tensors; a graph is captured anew where it changes.

        Returns:
            The mean loss over the global batch and the norm of the gradients, on the device.
        """
        self.scale.copy_(counted.reciprocal())
        self.total.zero_()
        for batch in micro_batches:
            self._add(batch, phase)
        total = self.total.clone()
        dist.all_reduce(total, group=self.group)
        norm = self._reduce()
        self._update(norm)
        return total, norm

    def _add(self, batch: Batch, phase: Hashable) -> None:
        """Add a micro-batch's loss and gradients."""
        key = phase, *((name, tensor.shape) for name, tensor in batch.items())
        if self._captured is None or self._captured.key != key:
            if self._captured is not None:
                self._captured = None  # and its graph
                torch.cuda.empty_cache()  # what the graph held would lie beside the memory of the next
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

    def _run(self, inputs: Batch) -> None:
        loss = self.loss(inputs) * self.scale
        loss.backward()
        self.total += loss.detach()

    def _reduce(self) -> Tensor:
        """Sum the gradients over the data-parallel ranks, each rank its partition; the norm of the whole."""
        if self.group.size() > 1:
            for flat, partition in zip(self.flat_gradients, self.partitions, strict=True):
                if dist.get_backend(self.group) == "nccl":
                    dist.reduce_scatter_tensor(partition, flat, group=self.group)
                else:
                    dist.all_reduce(flat, group=self.group)
        squares = torch.stack([torch.linalg.vector_norm(partition) for partition in self.partitions]).square().sum()
        dist.all_reduce(squares, group=self.group)
        return squares.sqrt()

    def _update(self, norm: Tensor) -> None:
        """Clip, step, hand the weights to the model, clear the gradients."""
        adamw = self.optimizer.optimizer
        # What torch's loss scaling gives a fused optimizer: it divides gradients by the one, and by the other does not
        # step.
        adamw.grad_scale = ((norm + 1e-6) / self.max_norm).clamp(min=1.0) if self.max_norm > 0 else None
        adamw.found_inf = (~norm.isfinite()).float()
        adamw.step()
        self.optimizer.update_lp_params()
        self.optimizer.clear_hp_grads()


@torch.no_grad()
def _move_gradient(total: Tensor, parameter: torch.nn.Parameter) -> None:
    total.add_(parameter.grad)  # type: ignore[arg-type]
    parameter.grad = None  # else autograd would add the next one to it, in a graph to memory that others use by then
