"""Recompute gives bitwise equal gradients, and never selects twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_mosa.attention import get_mosa_block_spec
from megatron_mosa.attention.thresholds import mosa_layers, selection_buffers
from megatron_mosa.kernels import naive
from megatron_mosa.kernels.triton import scattered, tiles
from megatron_mosa.parallel import Layout
from tests.unit.test_spec import build_gpt, make_config


def gradients(
    recompute: str, monkeypatch: pytest.MonkeyPatch, backend: str = "naive", by_threshold: bool = False
) -> tuple[list[torch.Tensor], int, int]:
    """Return the gradients of a model, the number of selections, and the bytes kept between forward and backward."""
    selections = 0
    # A function that each selection calls once.
    module, name = (naive.torch, "sort") if backend == "naive" else (tiles, "selection")
    if by_threshold:
        module, name = (naive, "_is_above") if backend == "naive" else (tiles, "select_above")
    function = getattr(module, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal selections
        selections += 1
        return function(*args, **kwargs)

    torch.manual_seed(0)
    # Interpreting a kernel takes about a second.
    batch, length, heads = (4, 32, 6) if backend == "naive" else (1, 8, 2)
    config = make_config(
        mosa_recompute=recompute, mosa_backend=backend, mosa_selection="threshold" if by_threshold else "expert_choice",
        num_mosa_heads=heads, mosa_load_feedback=0.0,
    )  # fmt: skip
    model = build_gpt(config, get_mosa_block_spec(config))
    for buffer_name, buffer in selection_buffers(model).items():
        buffer.fill_(1000 if buffer_name.endswith("updates") else 0.5)
    tokens = torch.randint(0, 64, (batch, length + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).expand(batch, length)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(module, name, counting)
        patch.setattr(scattered, "FEWEST_CHUNKS", 1)  # fewer programs to interpret
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        loss.backward()
    for layer in mosa_layers(model) if by_threshold else ():
        assert (layer.histogram.sum(dim=-1) == batch * length).all()  # every score was counted once
    return [p.grad for p in model.parameters() if p.grad is not None], selections, sum(kept.values())


@pytest.mark.parametrize(
    ("recompute", "backend", "by_threshold"),
    [
        *((recompute, "naive", by) for recompute in ("attention", "full") for by in (False, True)),
        *(("full", "triton", False), ("attention", "triton", True)),
    ],
)
def test_recompute_is_exact_and_selects_once(
    layout: Layout, recompute: str, backend: str, by_threshold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, selections, kept = gradients("none", monkeypatch, backend, by_threshold)
    assert selections == 2  # one per layer
    found, selections_again, kept_less = gradients(recompute, monkeypatch, backend, by_threshold)
    assert selections_again == 2
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert kept_less < 0.8 * kept


def test_megatrons_own_recompute_is_refused() -> None:
    with pytest.raises(ValueError, match="select tokens twice"):
        make_config(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    with pytest.raises(ValueError, match="mosa_recompute must be one of none, attention, full, got all"):
        make_config(mosa_recompute="all")
