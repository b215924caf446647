"""Optimizer steps in bf16 whose micro-batches are one CUDA graph each.

DeepSpeed's optimizer keeps the state. Its engine calls nothing here: its hooks would wait for the device, and round
accumulated gradients to bf16 under ZeRO-1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from megatron_mosa.engine.flat_buffers import Storage
from megatron_mosa.engine.optimizer import MOMENTS, adamw_step, set_state
from megatron_mosa.engine.protocol import Batch
from megatron_mosa.parallel import data_parallel_group, tensor_parallel_group

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
        storage: of weights and gradients.
        adamw: torch's AdamW, which holds the moments.
        loss: returns the loss of a micro-batch, summed over its tokens; must not wait for the device.
        max_norm: limit for the norm of the gradients; 0: no clipping.
    """

    def __init__(
        self, storage: Storage, adamw: torch.optim.Optimizer, loss: Callable[[Batch], Tensor], max_norm: float
    ) -> None:
        self.storage = storage
        self.adamw = adamw
        self.loss = loss
        self.max_norm = max_norm
        self.group = data_parallel_group()
        device = storage.parts[0].gradient.device
        self.scale, self.total, self.learning_rate = torch.zeros(3, device=device).unbind()
        self._captured: _Captured | None = None
        self._adamw_step = torch.compile(adamw_step, dynamic=False) if device.type == "cuda" else adamw_step
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
        self.storage.start_step()
        for number, batch in enumerate(micro_batches):
            self._is_first.fill_(number == 0)
            self._add(batch, phase)
        self.learning_rate.fill_(learning_rate)
        total = self.total.clone()
        if self.group.size() > 1:
            dist.all_reduce(total, group=self.group)
        self.storage.reduce()
        norm = self._norm()
        self._update(norm)
        return total, norm

    def prepare_evaluation(self) -> None:
        """Let the model have its weights in forward passes until the next step."""
        self.storage.start_step()
        self.storage.start_pass(self._is_first)

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
        """Free the graph and take the hooks off the model, after the last step.

        Python's garbage collector does not see what a parameter's hooks refer to: with them, neither the parameters nor
        this object and what it refers to, such as the optimizer's state, would ever be freed.
        """
        self.release()
        self.storage.close()

    def release(self) -> None:
        """Free the graph, if there is one, and its memory.

        NCCL would wait forever for a communicator to be destroyed that a graph still refers to.
        """
        if self._captured is not None:
            self._captured = None  # and its graph
            torch.cuda.empty_cache()  # what the graph held would lie beside the memory of the next

    def _run(self, inputs: Batch) -> None:
        self.storage.start_pass(self._is_first)
        loss = self.loss(inputs) * self.scale
        loss.backward()
        self.total += loss.detach()
        self.storage.finish_pass()

    def _norm(self) -> Tensor:
        """Return the norm of the gradients of the whole model."""
        counted = [part.gradient for part in self.storage.parts if part.is_counted]
        squares = torch.stack([torch.linalg.vector_norm(gradient) for gradient in counted]).square().sum()
        for group in (self.group, tensor_parallel_group()):
            if group.size() > 1:
                dist.all_reduce(squares, group=group)
        return squares.sqrt()

    def _update(self, norm: Tensor) -> None:
        """Clip, step, and hand the weights to the model."""
        scale = (self.max_norm / (norm + 1e-6)).clamp(max=1.0) if self.max_norm > 0 else torch.ones_like(norm)
        is_finite = norm.isfinite()
        for part in self.storage.parts:
            if part.weights not in self.adamw.state:
                moments = {moment: torch.zeros_like(part.weights) for moment in MOMENTS}
                set_state(self.adamw, part.weights, moments, 0)
            state, (beta1, beta2) = self.adamw.state[part.weights], part.options["betas"]
            self._adamw_step(
                part.weights.detach(), part.rounded, part.gradient,
                state["exp_avg"], state["exp_avg_sq"], state["step"], self.learning_rate, scale, is_finite,
                beta1, beta2, part.options["eps"], part.options["weight_decay"],
            )  # fmt: skip
        self.storage.publish()
