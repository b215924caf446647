"""Which layers take Gluon's kernels for Hopper."""

from __future__ import annotations

import runpy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_mosa.kernels.triton import common, specialized
from megatron_mosa.kernels.triton.gathered import PAIR, Rotation
from megatron_mosa.kernels.triton.rows import Rows

HEADS, WIDTH, SELECTED = 200, 512, 64


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """On a GPU that is said to be Hopper, the kernels that are called, none of which runs."""
    calls: list[str] = []

    class Kernels:
        def qkv_product(self, *_: object) -> None:
            calls.append("gluon")

        def qkv_weight_gradient(self, *_: object) -> None:
            calls.append("gluon gradient")

    monkeypatch.setattr(specialized, "ENABLED", True)
    monkeypatch.setattr(specialized, "_is_supported", lambda device: True)
    monkeypatch.setattr(specialized, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(specialized, "hopper", Kernels)
    monkeypatch.setattr(specialized, "gathered_product", lambda *_, **__: calls.append("triton"))
    monkeypatch.setattr(specialized, "weight_gradient", lambda *_, **__: calls.append("triton gradient"))
    return calls


def rows(batch: int, heads: int, length: int) -> Rows:
    empty = torch.empty(heads, batch * SELECTED, dtype=torch.int32)
    counts = torch.empty(heads, batch + 1, dtype=torch.int32)
    return Rows(empty, counts, torch.empty(batch * length + 1, dtype=torch.int32), empty.flatten())


def run(
    size: int = 64,
    width: int = WIDTH,
    heads: int = HEADS,
    dtype: torch.dtype = torch.bfloat16,
    half: int | None = None,
    restarts: bool = False,
    states: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> None:
    """Dispatch a product and a gradient."""
    batch, length = 8, 1000
    states = torch.empty(batch, length, width, dtype=dtype) if states is None else states
    weight = states.new_empty(heads, width, 3 * size) if weight is None else weight
    table = torch.empty(length, size // 4 if half is None else half)
    starts = torch.empty(batch, length, dtype=torch.int64) if restarts else None
    specialized.qkv_product(states, rows(batch, heads, length), weight, Rotation(table, table, starts))
    dqkv = states.new_empty(heads, batch * SELECTED, weight.shape[2])
    pairs, sums = states.new_empty(heads, batch * SELECTED, PAIR), states.new_empty(heads, width)
    specialized.qkv_weight_gradient(
        states, rows(batch, heads, length), dqkv, weight.new_empty(weight.shape), pairs, sums
    )


def unaligned() -> torch.Tensor:
    return torch.empty(8 * 1000 * WIDTH + 1, dtype=torch.bfloat16)[1:].view(8, 1000, WIDTH)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["gluon", "gluon gradient"]),
        ({"size": 128}, ["gluon", "gluon gradient"]),
        ({"half": 0, "dtype": torch.float16}, ["gluon", "gluon gradient"]),
        ({"states": torch.empty(8, 1000, WIDTH + 64).bfloat16()[..., :WIDTH]}, ["gluon", "gluon gradient"]),
        ({"width": 576}, ["gluon", "triton gradient"]),
        ({"restarts": True}, ["triton", "gluon gradient"]),
        ({"half": 32}, ["triton", "gluon gradient"]),
        ({"weight": torch.empty(HEADS, 192, WIDTH).bfloat16().mT}, ["triton", "gluon gradient"]),
        ({"heads": 62}, ["triton", "triton gradient"]),
        ({"heads": 63}, ["gluon", "gluon gradient"]),
        ({"size": 128, "heads": 31}, ["triton", "triton gradient"]),
        ({"size": 128, "heads": 32}, ["gluon", "gluon gradient"]),
        ({"width": 192}, ["triton", "triton gradient"]),
        ({"width": 528}, ["triton", "triton gradient"]),
        ({"size": 32}, ["triton", "triton gradient"]),
        ({"size": 256}, ["triton", "triton gradient"]),
        ({"dtype": torch.float32}, ["triton", "triton gradient"]),
        ({"states": unaligned()}, ["triton", "triton gradient"]),
        ({"states": torch.empty(8, WIDTH, 1000).bfloat16().mT}, ["triton", "triton gradient"]),
        ({"states": torch.empty(8, 1000, WIDTH + 4).bfloat16()[..., :WIDTH]}, ["triton", "triton gradient"]),
    ],
)
def test_what_the_kernels_take(options: dict[str, Any], expected: list[str], called: list[str]) -> None:
    run(**options)
    assert called == expected


@pytest.fixture
def described(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is said to be Hopper, products of ragged rows, none of which is computed."""
    kernels = SimpleNamespace(
        BOX_SIZE=64, TILE_ROWS=128, CUT={(1, False), (3, True)}, RaggedProduct=lambda *given: given[0].shape
    )
    monkeypatch.setattr(specialized, "hopper_scattered", lambda: kernels)
    monkeypatch.setattr(common, "has_descriptors", lambda device: True)


def ragged(
    inner: int = 64,
    columns: int = 512,
    dtype: torch.dtype = torch.bfloat16,
    has_pairs: bool = False,
    heads: int = 200,
    router_type: torch.dtype | None = None,
    transposed: bool = False,
) -> object:
    """Dispatch a product of ragged rows."""
    values, weight = torch.empty(heads, 512, inner, dtype=dtype), torch.empty(heads, inner, columns, dtype=dtype)
    if transposed:
        weight = torch.empty(heads, columns, inner, dtype=dtype).mT
    router = values.new_empty(heads, columns, dtype=router_type)
    pairs = (values.new_empty(heads, 512, PAIR), router) if has_pairs else None
    products = values.new_empty(heads, 256, columns)
    return specialized.ragged_product(values, weight, rows(8, heads, 1000), pairs, products, 4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"inner": 192, "has_pairs": True}, True),
        ({"inner": 192, "has_pairs": True, "transposed": True}, True),
        ({"inner": 192, "has_pairs": True, "router_type": torch.float32}, False),
        ({"columns": 328, "dtype": torch.float16}, True),
        ({"inner": 192}, False),
        ({"has_pairs": True}, False),
        ({"inner": 96}, False),
        ({"dtype": torch.float32}, False),
        ({"columns": 324}, False),
        ({"heads": 31}, False),
        ({"heads": 32}, True),
    ],
)
@pytest.mark.usefixtures("described")
def test_products_of_ragged_rows_that_the_kernels_take(options: dict[str, Any], expected: bool) -> None:
    assert (ragged(**options) is not None) is expected


@pytest.mark.parametrize("name", ["ENABLED", "_is_supported", "hopper_scattered"])
@pytest.mark.usefixtures("described")
def test_products_of_ragged_rows_are_not_theirs_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"ENABLED": False, "_is_supported": lambda device: False, "hopper_scattered": lambda: None}
    monkeypatch.setattr(specialized, name, absent[name])
    assert ragged() is None


def test_not_if_offsets_need_64_bits(called: list[str]) -> None:
    """Without the memory: a view that skips most of a large buffer."""
    storage = torch.empty(0, device="meta", dtype=torch.bfloat16)
    large = torch.as_strided(storage.new_empty(1 << 32), (8, 1000, WIDTH), (1 << 29, WIDTH, 1))
    assert not specialized.can_specialize(large, HEADS, 10_000, 16, torch.empty(HEADS, WIDTH, 192).bfloat16())


@pytest.mark.parametrize("name", ["ENABLED", "_is_supported", "hopper"])
def test_not_elsewhere(name: str, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"ENABLED": False, "_is_supported": lambda device: False, "hopper": lambda: None}
    monkeypatch.setattr(specialized, name, absent[name])
    run()
    assert called == ["triton", "triton gradient"]


@pytest.mark.parametrize(("version", "expected"), [("3.6.0", True), ("3.7.1", False)])
def test_versions_that_have_not_run_on_a_gpu_are_left_to_triton(
    version: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specialized.triton, "__version__", version)
    monkeypatch.setattr(specialized, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert specialized._is_supported.__wrapped__(torch.device("cuda")) is expected


@pytest.mark.parametrize(("value", "expected"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_turns_them_off(value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOSA_GLUON", raising=False)
    if value:
        monkeypatch.setenv("MOSA_GLUON", value)
    assert runpy.run_path(specialized.__file__)["ENABLED"] is expected
