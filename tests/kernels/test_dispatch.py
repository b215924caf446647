"""The choice of the kernel backend."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_mosa.kernels import dispatch, get_backend, naive

STATES = torch.empty(0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOSA_BACKEND", raising=False)
    dispatch._log_once.cache_clear()


def test_auto_is_naive_without_a_gpu_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "megatron_mosa"):
        assert get_backend("auto", STATES) is naive
        assert get_backend("auto", STATES) is naive
    assert [record.getMessage() for record in caplog.records] == ["MoSA heads run on the naive backend: no GPU"]


def test_auto_is_triton_on_a_gpu_that_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, capabilities = torch.device("cuda"), iter([(7, 5), (8, 0)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: next(capabilities))
    assert dispatch._resolve_auto(gpu, torch.bfloat16, 64)[0] == "naive"
    assert dispatch._resolve_auto(gpu, torch.bfloat16, 64)[0] == "triton"
    assert dispatch._resolve_auto(gpu, torch.float64, 64)[0] == "naive"
    assert dispatch._resolve_auto(gpu, torch.bfloat16, 257)[0] == "naive"


def test_a_triton_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_triton_version", lambda: (3, 3))
    with pytest.raises(ValueError, match="backend='triton' does not run here: triton is 3.3, older than 3.4; use"):
        get_backend("triton", STATES)


def test_the_environment_decides_what_auto_is_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSA_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert get_backend("auto", STATES) is get_backend("triton", STATES)
    assert get_backend("naive", STATES) is naive


@pytest.mark.parametrize(
    ("states", "head_dim", "hindrance"),
    [
        (STATES.double(), 64, "hidden_states is torch.float64, not fp16, bf16 or fp32"),
        (STATES, 300, "the head dimension is 300, above 256"),
        (STATES, 64, "hidden_states is on cpu, not on a GPU, and TRITON_INTERPRET=1 is not set"),
    ],
)
def test_what_triton_cannot_take(
    states: torch.Tensor, head_dim: int, hindrance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"^backend='triton' does not run here: {hindrance}; use 'naive'$"):
        get_backend("triton", states, head_dim)
