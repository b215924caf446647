"""The step of AdamW that is compiled on GPUs, as it is written, against torch's AdamW."""

from __future__ import annotations

import torch

from megatron_mosa.engine.optimizer import adamw_step


def check_adamw_step(step: object, device: str) -> None:
    """Six steps with changing rates and clipping, one of which is not finite and must change nothing."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3001, generator=generator)
    theirs = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([theirs], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours, moments = weights.to(device), [torch.zeros(3001, device=device) for _ in range(2)]
    rounded, count = torch.empty(3001, dtype=torch.bfloat16, device=device), torch.zeros((), device=device)
    for number in range(6):
        gradient, rate, scale = torch.randn(3001, generator=generator), 1e-2 / (1 + number), 0.3 + 0.1 * number
        is_finite = number != 3
        if is_finite:
            optimizer.param_groups[0]["lr"] = rate
            theirs.grad = gradient * scale
            optimizer.step()
        else:
            gradient[5], scale = torch.inf, torch.nan
        scalars = (torch.tensor(value, device=device) for value in (rate, scale, is_finite))
        step(ours, rounded, gradient.to(device), *moments, count, *scalars, 0.9, 0.95, 1e-8, 0.1)  # type: ignore[operator]
        torch.testing.assert_close(ours.cpu(), theirs.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(rounded, ours.bfloat16())
    assert count.item() == 5
    for moment, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        torch.testing.assert_close(moment.cpu(), optimizer.state[theirs][name], rtol=1e-5, atol=1e-7)


def test_the_step_is_that_of_torch() -> None:
    check_adamw_step(adamw_step, "cpu")
