"""NVIDIA apex's FusedAdam and norms give the numbers of torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megatron_mosa.parallel.apex import apex_fused_adam, apex_norms
from tests.distributed import tasks
from tests.distributed.pool import WorkerPools

pytestmark = pytest.mark.skipif(apex_fused_adam() is None, reason="NVIDIA apex is not installed")


@pytest.mark.parametrize("variant", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")]
)
def test_training_with_apex_is_training_without(workers: WorkerPools, zero: int, precision: str, variant: str) -> None:
    options: dict = dict(
        train__global_batch_size=8,
        train__micro_batch_size=2,
        train__precision=precision,
        parallel__zero_stage=zero,
        model__normalization=variant,
    )
    config = tasks.tiny_config(**options)
    expected = {0: "ClippingFusedAdam", 3: "AdamW"}.get(zero, "FusedAdam")
    assert workers(1).run(tasks.optimizer_name, config)[0] == expected
    losses, norms = workers(1).run(tasks.losses_under_zero, config, 5)[0]
    without = workers(1).run(tasks.losses_under_zero, tasks.tiny_config(train__apex="never", **options), 5)[0]
    loss_tolerance, norm_tolerance = (2e-5, 1e-3) if precision == "fp32" else (5e-3, 5e-2)
    assert losses == pytest.approx(without[0], rel=loss_tolerance)
    assert norms == pytest.approx(without[1], rel=norm_tolerance)
    assert losses != without[0]  # other kernels were at work
    straight, resumed = workers(1).run(tasks.losses_after_loading, config, 3, 3)[0]
    assert straight == resumed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    apex = apex_norms()
    assert apex is not None
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(*shape, device="cuda", generator=generator) for shape in ((64, 3, 256), (256,), (256,))]
    states, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in inputs)
    pairs = [
        (apex.fused_layer_norm_affine(states, weight, bias, (256,), 1e-5), F.layer_norm(states, (256,), weight, bias)),
        (apex.fused_rms_norm_affine(states, weight, (256,), 1e-5), F.rms_norm(states, (256,), weight, 1e-5)),
    ]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, theirs in pairs:
        upstream = torch.randn(ours.shape, device="cuda", generator=generator).to(dtype)
        gradients = [
            torch.autograd.grad(output, [states, weight], upstream, retain_graph=True) for output in (ours, theirs)
        ]
        for found, expected in zip((ours, *gradients[0]), (theirs, *gradients[1]), strict=True):
            assert (found - expected).float().norm() < tolerance * expected.float().norm()
