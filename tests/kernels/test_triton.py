"""Triton's kernels, interpreted on the CPU, against the naive path in fp64 on the same selection."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_mosa.attention import mosa_attention, num_selected_tokens
from megatron_mosa.kernels import Documents, get_backend, naive
from megatron_mosa.kernels.triton import scattered
from tests.kernels.reference import choose
from tests.kernels.test_documents import LENGTHS, pack
from tests.kernels.test_naive import make_inputs


@pytest.fixture(scope="module")
def fused() -> Iterator[ModuleType]:
    """The kernels; torch fills new memory with NaN meanwhile, so that nothing unwritten is read unseen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield get_backend("triton", torch.empty(0))
    torch.use_deterministic_algorithms(False)


def errors(
    fused: ModuleType,
    inputs: list[torch.Tensor],
    indices: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    documents: Documents | None = None,
    **options: object,
) -> tuple[list[float], list[float]]:
    """Relative errors of the output and of all gradients against fp64: of these kernels, and of the naive ones."""
    settings: dict = dict(rotary_percent=0.5, rotary_base=100.0) | options
    if documents is not None:
        settings["document_starts"] = documents.starts
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])

    def run(kernels: ModuleType, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [tensor.detach().to(rounded).to(dtype).requires_grad_() for tensor in inputs]  # the same values
        scores = kernels.router_scores(tensors[0], tensors[1])
        options = settings if kernels is fused else {k: v for k, v in settings.items() if k != "deterministic"}
        output = kernels.selected_attention(*tensors[:2], scores, indices, *tensors[2:], **options)
        return [output, *torch.autograd.grad(output, tensors, upstream.to(rounded).to(dtype))]

    rounded = dtype
    exact = run(naive, torch.float64)
    assert all(tensor.norm() > 0 for tensor in exact)

    def relative(kernels: ModuleType) -> list[float]:
        found = run(kernels, dtype)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    return relative(fused), relative(naive)


def selection(inputs: list[torch.Tensor], num_selected: int, include_first_token: bool = False) -> torch.Tensor:
    return naive.select_tokens(naive.router_scores(inputs[0], inputs[1]).detach(), num_selected, include_first_token)


SHAPES = [  # B, T, E, h, h', k
    (1, 2, 1, 16, 4, 2),
    (2, 63, 3, 33, 12, 31),
    (2, 100, 2, 40, 16, 64),
    (1, 130, 2, 24, 8, 128),
    (1, 20, 17, 24, 32, 5),
    (3, 7, 2, 8, 8, 1),
    (1, 9, 40, 16, 8, 8),  # more rows of a token than are summed at once
]


@pytest.mark.parametrize(
    ("rotary_percent", "shape"),
    [(0.7, shape) for shape in SHAPES] + [(percent, SHAPES[i]) for percent in (0.0, 1.0) for i in (0, 1, 5)],
    ids=str,
)
def test_fp32(fused: ModuleType, rotary_percent: float, shape: tuple) -> None:
    inputs = make_inputs(*shape[:5])
    ours, _ = errors(fused, inputs, selection(inputs, shape[5]), rotary_percent=rotary_percent)
    assert max(ours) < 1e-5


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
def test_fp16_loses_no_more_than_the_naive_path_does(fused: ModuleType, shape: tuple) -> None:
    inputs = make_inputs(*shape[:5])
    ours, naives = errors(fused, inputs, selection(inputs, shape[5]), torch.float16)
    assert all(a < 2 * b for a, b in zip(ours, naives, strict=True)), (ours, naives)


@pytest.mark.parametrize("restart_rotary", [False, True])
@pytest.mark.parametrize("scope", ["sequence", "document"])
def test_documents_and_empty_slots(fused: ModuleType, scope: str, restart_rotary: bool) -> None:
    inputs, documents = make_inputs(4, 17, 3, 16, 8), pack(LENGTHS)
    scores = naive.router_scores(inputs[0], inputs[1]).detach()
    indices = naive.select_tokens(scores, 7, True, documents.starts)
    if scope == "document":
        chosen = documents.selection(lambda length: num_selected_tokens(length, 3.0))
        indices = naive.select_tokens(scores, chosen.num_slots, True, documents.starts, chosen.quotas)
        assert (indices == 17).any()
    ours, _ = errors(fused, inputs, indices, documents=documents, restart_rotary=restart_rotary)
    assert max(ours) < 1e-5


@pytest.mark.parametrize("include_first_token", [False, True])
def test_selection_on_ties(fused: ModuleType, include_first_token: bool) -> None:
    ties = torch.randint(0, 5, (2, 3, 101), generator=torch.Generator().manual_seed(0)) / 5 + 0.1
    for scores in (ties, torch.full((1, 2, 33), 0.5), torch.rand(1, 2, 5000)):
        length = scores.shape[-1]
        for num_selected in (1, 2, 31, length):
            indices = fused.select_tokens(scores, num_selected, include_first_token)
            for b, e in ((b, e) for b in range(scores.shape[0]) for e in range(scores.shape[1])):
                included = [0] * include_first_token
                assert indices[b, e].tolist() == choose(scores[b, e].tolist(), num_selected, included)


def test_scores(fused: ModuleType) -> None:
    states, weight = make_inputs(2, 150, 70, 40, 8)[:2]
    found = fused.router_scores(states.float(), weight.float())
    torch.testing.assert_close(found.double(), naive.router_scores(states, weight), rtol=1e-5, atol=1e-7)


def test_twice_is_the_same_to_the_last_bit_and_strides_do_not_matter(fused: ModuleType) -> None:
    inputs = [tensor.detach().float() for tensor in make_inputs(2, 12, 3, 24, 8)]

    def run(states: torch.Tensor) -> list[torch.Tensor]:
        states = states.detach().requires_grad_()
        weights = [tensor.detach().requires_grad_() for tensor in inputs[1:]]
        output = mosa_attention(states, *weights, num_selected=5, backend="triton")
        return [output, *torch.autograd.grad(output.square().sum(), [states, *weights])]

    first = run(inputs[0])
    for states in (inputs[0], inputs[0].transpose(0, 1).contiguous().transpose(0, 1), inputs[0].mT.contiguous().mT):
        for ours, theirs in zip(run(states), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("width", [144, 72, 6])
def test_chunks_of_the_sum_over_heads_do_not_change_it(
    fused: ModuleType, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(5, 4, 3, width, 8)]
    sequence_bytes = 3 * 2 * width * 4

    def run(fewest: int, most_bytes: int = 1 << 20) -> list[torch.Tensor]:
        monkeypatch.setattr(scattered, "FEWEST_CHUNKS", fewest)
        monkeypatch.setattr(scattered, "MOST_BYTES", most_bytes)
        output = mosa_attention(*inputs, num_selected=2, backend="triton")
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    whole = run(1)
    # The interpreter multiplies by NumPy, which rounds blocks of other shapes otherwise on some processors; that a GPU
    # gives the same bits is tested there.
    cuts: list[tuple[int, ...]] = [(2,), (1, sequence_bytes), (1, 1)]  # pairs of sequences; each; columns of each
    if width > 128:
        cuts.append((4, 1))  # fewer columns
    for cut in cuts:
        for ours, theirs in zip(run(*cut), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_no_chunk_is_more_than_half_of_the_products() -> None:
    for width in range(2, 1200):
        for batch in (1, 2, 3, 4, 9):
            sequences, columns = scattered.chunks_of(batch, 1000 * width, width)
            assert sequences * columns <= batch * (width + 1) // 2


def test_without_determinism_atomics_add_up(fused: ModuleType) -> None:
    inputs = make_inputs(2, 30, 5, 40, 16)
    ours, _ = errors(fused, inputs, selection(inputs, 9), deterministic=False)
    assert max(ours) < 1e-5


def test_backward_makes_no_gradients_of_what_forward_keeps(fused: ModuleType) -> None:
    """Autograd would fill zeros for them: as much memory again as is kept."""
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(2, 20, 3, 16, 8)]
    output = mosa_attention(*inputs, num_selected=5, backend="triton")
    made: list[tuple[int, ...]] = []

    class Zeros(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if "zeros" in str(function):
                made.append(tuple(result.shape))
            return result

    with Zeros():
        output.sum().backward()
    assert (3, 2 * 5, 3 * 8) not in made  # queries, keys and values


def test_the_operators_are_good_citizens(fused: ModuleType) -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(2, 6, 3, 16, 8)]
    scores = fused.router_scores(inputs[0], inputs[1])
    operators = torch.ops.megatron_mosa
    indices = fused.select_tokens(scores, 3)
    calls = {
        operators.fused_router_scores: (inputs[0].detach(), inputs[1].detach()),
        operators.fused_select_tokens: (scores, 3, True),
        operators.fused_attention: (*inputs[:2], scores, indices, *inputs[2:], 0.5, 100.0, None, False, True),
    }
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for operator, arguments in calls.items():
        found = torch.library.opcheck(operator, arguments, test_utils=checks)  # raises at the first failure
        assert found == dict.fromkeys(checks, "SUCCESS"), operator


def test_a_compiled_program_is_one_graph(fused: ModuleType) -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(2, 6, 3, 16, 8)]

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return mosa_attention(*tensors, num_selected=3, backend="triton")

    outputs = [layer(*inputs), torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)]
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    for ours, theirs in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert torch.equal(ours, theirs)


def test_flops_are_those_of_the_naive_path(fused: ModuleType) -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(2, 20, 3, 16, 8)]

    def count(backend: str) -> int:
        with FlopCounterMode(display=False) as counter:
            output = mosa_attention(*inputs, num_selected=5, backend=backend)
            output.sum().backward()
        return counter.get_total_flops()

    # The naive path's router has a dense gradient of two products more; the gates' gradient is no product here.
    dense_router = 2 * 2 * 2 * 20 * 16 * 3
    assert count("triton") == count("naive") - dense_router


def test_bad_states_are_refused(fused: ModuleType) -> None:
    inputs = make_inputs(1, 8, 2, 4, 4)
    with pytest.raises(ValueError, match="backend='triton' does not run here: hidden_states is torch.float64"):
        mosa_attention(*inputs, num_selected=3, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' is not known"):
        mosa_attention(*inputs, num_selected=3, backend="cuda")
