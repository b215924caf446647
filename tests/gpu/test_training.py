"""The same model on a GPU and on the CPU; resuming on a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_mosa.attention import mosa_attention
from megatron_mosa.kernels import naive
from tests.distributed import tasks
from tests.distributed.pool import WorkerPool
from tests.kernels.test_naive import make_inputs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_on_the_gpu_are_those_of_a_plain_loop_in_fp32(worker: WorkerPool, precision: str) -> None:
    config = tasks.tiny_config(train__global_batch_size=8, train__micro_batch_size=2, train__precision=precision)
    losses, norms = worker.run(tasks.losses_under_zero, config, 5)[0]
    plain_config = tasks.tiny_config(train__global_batch_size=8, train__micro_batch_size=8)
    plain_losses, plain_norms = worker.run(tasks.losses_of_a_plain_loop, plain_config, 5)[0]
    loss_tolerance, norm_tolerance = (2e-5, 1e-3) if precision == "fp32" else (5e-3, 5e-2)
    assert losses == pytest.approx(plain_losses, rel=loss_tolerance)
    assert norms == pytest.approx(plain_norms, rel=norm_tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_on_the_gpu_is_bitwise_the_same(worker: WorkerPool, precision: str) -> None:
    config = tasks.tiny_config(train__precision=precision, train__global_batch_size=8, train__micro_batch_size=2)
    straight, resumed = worker.run(tasks.losses_after_loading, config, 3, 3)[0]
    assert straight == resumed


def test_naive_kernels_on_the_gpu_equal_the_cpu() -> None:
    cpu = make_inputs(2, 100, 3, 32, 16)
    gpu = [tensor.detach().cuda().requires_grad_() for tensor in cpu]
    assert torch.equal(
        naive.select_tokens(naive.router_scores(gpu[0], gpu[1]), 7).cpu(),
        naive.select_tokens(naive.router_scores(cpu[0], cpu[1]), 7),
    )
    outputs = [mosa_attention(*tensors, num_selected=7) for tensors in (cpu, gpu)]
    torch.testing.assert_close(outputs[1].cpu(), outputs[0], rtol=1e-9, atol=1e-11)
    gradients = [
        torch.autograd.grad(output.square().sum(), tensors) for output, tensors in zip(outputs, (cpu, gpu), strict=True)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-8, atol=1e-10)
