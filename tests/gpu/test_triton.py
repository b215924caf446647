"""Triton's kernels on the GPU against the naive path in fp64 on the same selection."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from megatron_mosa.attention import mosa_attention, num_selected_tokens
from megatron_mosa.kernels import Documents, KernelBackend, get_backend, naive
from megatron_mosa.kernels.triton import scattered
from megatron_mosa.kernels.triton.common import launch
from tests.distributed import tasks
from tests.distributed.pool import WorkerPools
from tests.kernels.test_documents import pack
from tests.kernels.test_naive import make_inputs
from tests.kernels.test_triton import errors, selection

LENGTHS = [[100, 1, 27, 128], [256], [3] * 85 + [1]]


@pytest.fixture(scope="module")
def fused() -> Iterator[KernelBackend]:
    """The kernels; torch fills new memory with NaN meanwhile."""
    torch.use_deterministic_algorithms(True)
    yield get_backend("triton", torch.empty(0, device="cuda"))
    torch.use_deterministic_algorithms(False)


def inputs_on_gpu(*sizes: int) -> list[torch.Tensor]:
    return [tensor.detach().cuda() for tensor in make_inputs(*sizes)]


SIZES = [(t, k) for t in (2, 63, 100, 1000, 1024) for k in (2, 31, 40, 64, 80, 128, 257) if k <= t]


@pytest.mark.parametrize("heads", [1, 3, 17, 128])
@pytest.mark.parametrize(("length", "selected"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients(fused: KernelBackend, length: int, selected: int, heads: int, dtype: torch.dtype) -> None:
    batch = max(2, 128 // (heads * selected))  # of fewer rows than 128 errors are chance
    inputs = inputs_on_gpu(batch, length, heads, 96, 64)
    ours, naives = errors(fused, inputs, selection(inputs, selected), dtype)
    if dtype == torch.float32:
        assert max(ours) < 1e-5
    else:
        assert all(a < 2 * b for a, b in zip(ours, naives, strict=True)), (ours, naives)


@pytest.mark.parametrize("head_dim", [32, 48, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dims(fused: KernelBackend, head_dim: int, dtype: torch.dtype) -> None:
    inputs = inputs_on_gpu(2, 200, 3, 129, head_dim)
    ours, naives = errors(fused, inputs, selection(inputs, 100), dtype, rotary_percent=1.0)
    assert max(ours) < 1e-5 if dtype == torch.float32 else all(a < 2 * b for a, b in zip(ours, naives, strict=True))


@pytest.mark.parametrize("rotary_percent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_the_tiles_of_large_layers(fused: KernelBackend, head_dim: int, rotary_percent: float) -> None:
    inputs = inputs_on_gpu(8, 1024, 80, 256, head_dim)
    ours, naives = errors(fused, inputs, selection(inputs, 64), torch.bfloat16, rotary_percent=rotary_percent)
    assert all(a < 2 * b for a, b in zip(ours, naives, strict=True)), (ours, naives)


@pytest.mark.parametrize("scope", ["sequence", "document"])
def test_documents_and_empty_slots(fused: KernelBackend, scope: str) -> None:
    inputs = inputs_on_gpu(3, 256, 3, 32, 16)
    documents = Documents.from_starts(pack(LENGTHS).starts, torch.device("cuda"))
    scores = naive.router_scores(inputs[0], inputs[1]).detach()
    indices = naive.select_tokens(scores, 70, True, documents.starts)
    if scope == "document":
        chosen = documents.selection(lambda length: num_selected_tokens(length, 3.0))
        indices = naive.select_tokens(scores, chosen.num_slots, True, documents.starts, chosen.quotas)
    ours, _ = errors(fused, inputs, indices, documents=documents, restart_rotary=True)
    assert max(ours) < 1e-5


@pytest.mark.parametrize("length", [1, 77, 1024, 8192, 65536])
def test_selection_equals_the_naive_one(fused: KernelBackend, length: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    ties = torch.randint(1, 50, (2, 3, length), device="cuda", generator=generator) / 50
    for scores in (
        torch.rand(2, 3, length, device="cuda", generator=generator) + 1e-6,
        ties,
        torch.full_like(ties, 0.5),
    ):
        for selected in {1, max(1, length // 16), length}:
            for first in (False, True):
                expected = naive.select_tokens(scores, selected, first)
                assert torch.equal(fused.select_tokens(scores, selected, first), expected)


def test_twice_is_the_same_to_the_last_bit(fused: KernelBackend) -> None:
    inputs = [tensor.bfloat16().requires_grad_() for tensor in inputs_on_gpu(4, 512, 24, 128, 64)]

    def run() -> list[torch.Tensor]:
        output = mosa_attention(*inputs, num_selected=64, backend="triton")
        return [output, *torch.autograd.grad(output.float().square().sum(), inputs)]

    for ours, theirs in zip(run(), run(), strict=True):
        assert torch.equal(ours, theirs)


def test_auto_is_triton_here() -> None:
    assert get_backend("auto", torch.empty(0, device="cuda")) is get_backend("triton", torch.empty(0, device="cuda"))


@pytest.mark.parametrize("width", [6, 72, 200, 1000])
def test_chunks_of_the_sum_over_heads_do_not_change_it(
    fused: KernelBackend, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [tensor.bfloat16().requires_grad_() for tensor in inputs_on_gpu(7, 256, 40, width, 64)]
    upstream = torch.randn_like(inputs[0])
    monkeypatch.setattr(scattered, "SMALL_BYTES", 0)

    def run(fewest: int, most_bytes: int = 1 << 30) -> list[torch.Tensor]:
        monkeypatch.setattr(scattered, "FEWEST_CHUNKS", fewest)
        monkeypatch.setattr(scattered, "MOST_BYTES", most_bytes)
        output = mosa_attention(*inputs, num_selected=33, backend="triton")
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    sequence = 40 * 33 * width * 2
    whole = run(1)
    for cut in ((3,), (1, sequence), (1, 1), (4, 1)):  # pairs of sequences; each; columns of each
        for number, (ours, theirs) in enumerate(zip(run(*cut), whole, strict=True)):
            if number <= 1:  # the output and dX, for which cuBLAS may choose other kernels
                assert (ours - theirs).norm() < 1e-3 * theirs.norm()
            else:
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_training_on_the_kernels_is_training_on_the_naive_path(workers: WorkerPools, recompute: str) -> None:
    options: dict = dict(train__global_batch_size=8, train__micro_batch_size=2, train__recompute=recompute)
    losses, norms = workers(1).run(tasks.engine_losses, tasks.tiny_config(mosa__backend="naive", **options), 5)[0]
    fused = workers(1).run(tasks.engine_losses, tasks.tiny_config(mosa__backend="triton", **options), 5)[0]
    assert fused[0] == pytest.approx(losses, rel=2e-5)
    assert fused[1] == pytest.approx(norms, rel=1e-3)


def test_the_kernels_compile_into_a_graph(fused: KernelBackend) -> None:
    inputs = [tensor.bfloat16() for tensor in inputs_on_gpu(2, 256, 6, 64, 32)]

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return mosa_attention(*tensors, num_selected=32, backend="triton")

    assert torch.equal(torch.compile(layer, fullgraph=True)(*inputs), layer(*inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(*inputs)
    graph.replay()
    assert torch.equal(captured, layer(*inputs))


@triton.jit
def _write_kernel(p_out, N, SCALE, BLOCK: tl.constexpr):
    tl.store(p_out + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32) + N * SCALE)


def test_numbers_of_a_kind_share_a_compiled_kernel() -> None:
    out = torch.zeros(16, device="cuda")
    for numbers in ((2, 3, 17, (1 << 31) - 1), (0, 16, 48, 1 << 30)):
        compiled = {id(_write_kernel[(1,)](out, number, 0.5 * number, BLOCK=16)) for number in numbers}
        assert len(compiled) == 1  # ``common.launch`` takes this for granted
        for number in numbers[:3]:
            launch(_write_kernel, (1,), out, number, 0.5, BLOCK=16)
            assert torch.equal(out, torch.full_like(out, 0.5 * number))
