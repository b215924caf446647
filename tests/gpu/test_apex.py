"""NVIDIA apex's FusedAdam and norms give the same numbers as torch's."""

from __future__ import annotations

import pytest
import torch

from megatron_mosa.parallel import norm_class
from megatron_mosa.parallel.apex import apex_fused_adam
from tests.distributed import tasks
from tests.distributed.pool import WorkerPools
from tests.unit.test_spec import make_config

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
    losses, norms = workers(1).run(tasks.engine_losses, config, 5)[0]
    without = workers(1).run(tasks.engine_losses, tasks.tiny_config(train__apex="never", **options), 5)[0]
    loss_tolerance, norm_tolerance = (2e-5, 1e-3) if precision == "fp32" else (5e-3, 5e-2)
    assert losses == pytest.approx(without[0], rel=loss_tolerance)
    assert norms == pytest.approx(without[1], rel=norm_tolerance)
    straight, resumed = workers(1).run(tasks.losses_after_loading, config, 3, 3)[0]
    assert straight == resumed


@pytest.mark.parametrize("variant", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype, variant: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    states, upstream = (torch.randn(64, 3, 256, device="cuda", generator=generator).to(dtype) for _ in range(2))
    states.requires_grad_()
    found = {}
    for uses_apex in (True, False):
        norm = norm_class(variant)(make_config(mosa_apex_norms=uses_apex, params_dtype=dtype), 256).cuda()
        torch.nn.init.normal_(norm.weight, generator=torch.Generator("cuda").manual_seed(1))
        output = norm(states)
        found[uses_apex] = [output, *torch.autograd.grad(output, [states, *norm.parameters()], upstream)]
        assert ("affine" in output.grad_fn.name().lower()) == uses_apex, output.grad_fn.name()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip(found[True], found[False], strict=True):
        assert (ours - theirs).float().norm() < tolerance * theirs.float().norm()
