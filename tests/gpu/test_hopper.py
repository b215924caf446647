"""Gluon's kernels on a Hopper GPU against products in fp32 by torch, and in the layer against Triton's."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_mosa.attention import mosa_attention
from megatron_mosa.kernels.triton import specialized
from megatron_mosa.kernels.triton.attention import rotary_table
from megatron_mosa.kernels.triton.gathered import PAIR, Rotation
from megatron_mosa.kernels.triton.rows import Rows, rows_of
from tests.gpu.test_triton import inputs_on_gpu

DEVICE = torch.device("cuda")
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}  # of one rounding: 2**-9 and 2**-12, relative to the norm less
BATCH, LENGTH, WIDTH, SELECTED = 4, 500, 512, 100

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not IS_HOPPER or specialized.hopper() is None, reason="needs Hopper and Triton 3.6")


class Case(NamedTuple):
    states: Tensor
    rows: Rows
    indices: list[Tensor]
    """Of each head, sequence and position of its rows, int64 [2, rows]."""


def make_case(heads: int, dtype: torch.dtype) -> Case:
    """Rows of which some heads have all, some few and one none; what follows a head's rows is poisoned."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    states = torch.randn(BATCH, LENGTH, WIDTH, device=DEVICE, generator=generator).to(dtype)
    scores = torch.rand(BATCH, heads, LENGTH, device=DEVICE, generator=generator)
    indices = scores.topk(SELECTED).indices.sort().values
    filled = torch.randint(1, SELECTED + 1, (BATCH, heads, 1), device=DEVICE, generator=generator)
    filled[:, 0], filled[:, 1], filled[:, 2], filled[:, 3] = SELECTED, 3, 0, 16  # 400, 12, 0 and 64 rows
    indices = torch.where(torch.arange(SELECTED, device=DEVICE) < filled, indices, LENGTH)
    rows = rows_of(indices, LENGTH, BATCH)
    found = []
    for head, count in enumerate(rows.cu_seqlens[:, -1].tolist()):
        rows.token_indices[head, count:] = 2**30
        index = rows.token_indices[head, :count].long()
        found.append(torch.stack((index >> rows.shift, index & ((1 << rows.shift) - 1))))
    return Case(states, rows, found)


def rotated(y: Tensor, position: Tensor, rotation: Rotation, size: int) -> Tensor:
    """Rotate queries and keys, [rows, 3h']."""
    half = rotation.cos.shape[1]
    cos, sin = rotation.cos[position], rotation.sin[position]
    y = y.clone()
    for column in (0, size):
        first, second = y[:, column : column + half].clone(), y[:, column + half : column + 2 * half].clone()
        y[:, column : column + half] = first * cos - second * sin
        y[:, column + half : column + 2 * half] = second * cos + first * sin
    return y


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Compare each column, so that no part can hide behind others."""
    error = (found.float() - expected).norm(dim=0) / expected.norm(dim=0).clamp(min=1e-30)
    assert error.max() < TOLERANCE[found.dtype], error


@pytest.mark.parametrize("processors", [132, 3])  # fewer tiles than programs, and more
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_qkv(size: int, dtype: torch.dtype, turns: bool, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper: Any = specialized.hopper()
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: processors)
    case = make_case(7, dtype)
    weight = (torch.randn(7, WIDTH, 3 * size, device=DEVICE) * WIDTH**-0.5).to(dtype)
    rotation = Rotation(*rotary_table(LENGTH, size // 4 if turns else 0, 1e4, DEVICE), None)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    try:
        found, again = (hopper.qkv_product(case.states, case.rows, weight, rotation) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.view(torch.int16), again.view(torch.int16))
    for head, index in enumerate(case.indices):
        product = case.states[index[0], index[1]].double() @ weight[head].double()
        assert_close(found[head, : index.shape[1]], rotated(product.float(), index[1], rotation, size))
        assert found[head, index.shape[1] :].isnan().all()


@pytest.mark.parametrize("processors", [132, 3])
@pytest.mark.parametrize("has_pairs", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_gradient_of_the_matrices(
    size: int, dtype: torch.dtype, has_pairs: bool, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper: Any = specialized.hopper()
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: processors)
    case = make_case(7, dtype)
    dqkv = torch.randn(7, BATCH * SELECTED, 3 * size, device=DEVICE).to(dtype)
    pairs = torch.zeros(7, BATCH * SELECTED, PAIR, device=DEVICE, dtype=dtype)
    pairs[..., :2] = torch.randn(7, BATCH * SELECTED, 2, device=DEVICE) * torch.tensor([1.0, 0.1], device=DEVICE)
    for head, index in enumerate(case.indices):
        dqkv[head, index.shape[1] :], pairs[head, index.shape[1] :] = float("nan"), float("nan")
    results = []
    for _ in range(2):
        output = torch.full((7, WIDTH, 3 * size), float("nan"), device=DEVICE, dtype=dtype)
        sums = torch.full((7, WIDTH), float("nan"), device=DEVICE, dtype=dtype)
        given = (pairs, sums) if has_pairs else (None, None)
        hopper.qkv_weight_gradient(case.states, case.rows, dqkv, output, *given)
        results.append((output, sums))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.view(torch.int16), second.view(torch.int16))
    for head, index in enumerate(case.indices):
        tokens = case.states[index[0], index[1]].double().T
        assert_close(output[head], (tokens @ dqkv[head, : index.shape[1]].double()).float())
        if has_pairs:
            expected = (tokens @ pairs[head, : index.shape[1]].double().sum(1, keepdim=True)).float()
            assert_close(sums[head, :, None], expected)


@pytest.mark.parametrize("processors", [132, 3])
@pytest.mark.parametrize(("sequences", "columns"), [(BATCH, WIDTH), (3, 320)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("inner", [64, 128, 192, 384])
def test_products_of_ragged_rows(
    inner: int, dtype: torch.dtype, sequences: int, columns: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: Any = specialized.hopper_scattered()
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: processors)
    case, has_pairs = make_case(7, dtype), inner >= 192
    counts = case.rows.cu_seqlens.tolist()
    values = torch.randn(7, BATCH * SELECTED, inner, device=DEVICE).to(dtype)
    pairs = torch.zeros(7, BATCH * SELECTED, PAIR, device=DEVICE, dtype=dtype)
    pairs[..., :2] = torch.randn(7, BATCH * SELECTED, 2, device=DEVICE) * torch.tensor([4.0, 0.4], device=DEVICE)
    router = torch.randn(7, WIDTH, device=DEVICE).to(dtype)
    for head in range(7):
        values[head, counts[head][-1] :], pairs[head, counts[head][-1] :] = float("nan"), float("nan")
    size = (7, WIDTH, inner) if has_pairs else (7, inner, WIDTH)
    weight = (torch.randn(size, device=DEVICE) * inner**-0.5).to(dtype)
    weight = weight.mT if has_pairs else weight
    exact = values.double().nan_to_num() @ weight.double()
    if has_pairs:
        exact += pairs.double().nan_to_num().sum(2, keepdim=True) * router.double()[:, None]
    products = torch.empty(7, sequences * SELECTED, columns, device=DEVICE, dtype=dtype)
    product = kernels.RaggedProduct(
        values, weight, case.rows, (pairs, router) if has_pairs else None, products, sequences
    )
    for chunk, first in itertools.product(range(-(-BATCH // sequences)), range(0, WIDTH, columns)):
        results = []
        for _ in range(2):
            products.fill_(float("nan"))
            product(chunk, first)
            results.append(products.clone())
        assert torch.equal(results[0].view(torch.int16), results[1].view(torch.int16))
        for head in range(7):
            begin = counts[head][chunk * sequences]
            end = counts[head][min(BATCH, (chunk + 1) * sequences)]
            expected = exact[head, begin:end, first : first + columns].float()
            assert_close(products[head, : end - begin, : expected.shape[1]], expected)
            assert products[head, -(-(end - begin) // 64) * 64 :].isnan().all()


@pytest.mark.parametrize("by_thresholds", [False, True])
@pytest.mark.parametrize("size", [64, 128])
def test_the_layer_is_what_it_is_on_tritons_kernels(
    size: int, by_thresholds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = 80
    inputs = [tensor.bfloat16().requires_grad_() for tensor in inputs_on_gpu(16, 512, heads, 1024, size)]
    options: dict[str, Any] = dict(num_selected=64)
    if by_thresholds:
        options = dict(thresholds=torch.full((heads,), 0.55, device=DEVICE), capacity=80)
    upstream, calls = torch.randn_like(inputs[0]), []
    hopper: Any = specialized.hopper()
    monkeypatch.setattr(specialized, "_is_supported", lambda device: True)  # whatever version of Triton is tried

    def run(enabled: bool) -> list[Tensor]:
        monkeypatch.setattr(specialized, "ENABLED", enabled)
        output = mosa_attention(*inputs, backend="triton", **options)
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    scattered: Any = specialized.hopper_scattered()
    with monkeypatch.context() as patch:
        for module, name in (
            (hopper, "qkv_product"), (hopper, "qkv_weight_gradient"), (scattered, "RaggedProduct"),
        ):  # fmt: skip
            kernel = getattr(module, name)
            patch.setattr(module, name, lambda *given, kernel=kernel: (calls.append(kernel), kernel(*given))[1])
        expected = run(False)
        assert not calls
        found, again = run(True), run(True)
        assert len(calls) == (8 if by_thresholds else 4)
    for ours, theirs, repeated in zip(found, expected, again, strict=True):
        assert torch.equal(ours, repeated)
        assert (ours - theirs).float().norm() < 1e-2 * theirs.float().norm()
