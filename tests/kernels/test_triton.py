"""Triton's kernels, interpreted on the CPU, against the naive path in fp64 on the same selection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_mosa.attention import mosa_attention, num_selected_tokens
from megatron_mosa.kernels import Documents, KernelBackend, get_backend, naive
from megatron_mosa.kernels.triton import scattered, tiles
from megatron_mosa.kernels.triton.common import can_be_described
from megatron_mosa.kernels.triton.gathered import PAIR
from megatron_mosa.kernels.triton.rows import rows_of
from tests.kernels.reference import choose
from tests.kernels.test_documents import pack
from tests.kernels.test_naive import make_inputs


@pytest.fixture(scope="module")
def fused() -> Iterator[KernelBackend]:
    """The kernels; torch fills new memory with NaN, so that unwritten values are noticed."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield get_backend("triton", torch.empty(0))
    torch.use_deterministic_algorithms(False)


def errors(
    fused: KernelBackend,
    inputs: list[torch.Tensor],
    indices: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    documents: Documents | None = None,
    **options: object,
) -> tuple[list[float], list[float]]:
    """Return the relative errors of output and gradients against fp64, for the kernels and for the naive path."""
    settings: dict = dict(rotary_percent=0.5, rotary_base=100.0) | options
    if documents is not None:
        settings["document_starts"] = documents.starts
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])

    def run(kernels: KernelBackend, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [tensor.detach().to(rounded).to(dtype).requires_grad_() for tensor in inputs]  # the same values
        scores = kernels.router_scores(tensors[0], tensors[1])
        output = kernels.selected_attention(*tensors[:2], scores, indices, *tensors[2:], **settings)
        return [output, *torch.autograd.grad(output, tensors, upstream.to(rounded).to(dtype))]

    rounded = dtype
    exact = run(naive, torch.float64)
    assert all(tensor.norm() > 0 for tensor in exact)

    def relative(kernels: KernelBackend) -> list[float]:
        found = run(kernels, dtype)
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    return relative(fused), relative(naive)


def selection(inputs: list[torch.Tensor], num_selected: int, include_first_token: bool = False) -> torch.Tensor:
    return naive.select_tokens(naive.router_scores(inputs[0], inputs[1]).detach(), num_selected, include_first_token)


# B, T, E, h, h', k. With small tiles a block are 8 rows of a head, 8 columns of the states, 8 tokens, 2 sequences, and
# in attention 4 slots. Of a token 8 rows are summed at once, and then 4.
SMALLEST = (1, 2, 1, 16, 4, 2)
REMAINDERS = (3, 9, 2, 11, 12, 6)  # everything is several blocks and a remainder; 18 rows are three, in groups of two
WHOLE = (2, 8, 2, 16, 16, 8)  # everything is exactly two blocks; k = T
TWO_TILES = (1, 7, 1, 8, 12, 6)  # of slots
FOUR_TILES = (1, 17, 1, 8, 8, 13)  # of slots, and three of tokens
MANY_HEADS = (1, 3, 11, 8, 8, 2)  # of a token, more rows than are summed at once
ONE_TOKEN = (3, 7, 2, 8, 8, 1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("rotary_percent", "shape"),
    [
        *((percent, shape) for percent in (0.0, 1.0) for shape in (SMALLEST, TWO_TILES)),
        *((0.7, shape) for shape in (SMALLEST, REMAINDERS, FOUR_TILES, MANY_HEADS, ONE_TOKEN)),
        (1.0, WHOLE),
    ],
    ids=str,
)
def test_fp32(fused: KernelBackend, rotary_percent: float, shape: tuple) -> None:
    inputs = make_inputs(*shape[:5])
    for is_full in {False, rotary_percent == 0.7}:
        ours, _ = errors(fused, inputs, selection(inputs, shape[5]), rotary_percent=rotary_percent, is_full=is_full)
        assert max(ours) < 1e-5


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("is_full", [True, False])
def test_what_other_heads_contribute_is_added(fused: KernelBackend, is_full: bool) -> None:
    inputs, addend = make_inputs(*REMAINDERS[:5]), torch.randn(9, 3, 11).transpose(0, 1).requires_grad_()
    ours, _ = errors(fused, inputs, selection(inputs, REMAINDERS[5]), is_full=is_full, addend=addend)
    assert max(ours) < 1e-5
    output = fused.selected_attention(
        *(tensor.detach().float() for tensor in inputs[:2]), torch.ones(3, 2, 9), selection(inputs, 6),
        *(tensor.detach().float() for tensor in inputs[2:]), rotary_percent=0.5, rotary_base=100.0, addend=addend,
    )  # fmt: skip
    upstream = torch.randn(output.shape)
    assert torch.equal(torch.autograd.grad(output, addend, upstream)[0], upstream)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 37, 2, 33, 12, 35),  # a block and a remainder of columns, of rows and of slots
        (1, 18, 1, 32, 32, 16),  # exactly a block of columns, of slots and of the head's width
        (1, 3, 1, 8, 132, 2),  # queries, keys and values need one program each
    ],
    ids=str,
)
def test_tiles_as_they_are_chosen(fused: KernelBackend, shape: tuple) -> None:
    inputs = make_inputs(*shape[:5])
    ours, _ = errors(fused, inputs, selection(inputs, shape[5]), rotary_percent=1.0)
    assert max(ours) < 1e-5


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shape", [REMAINDERS, (2, 6, 2, 16, 16, 4)], ids=str)  # several tiles of slots; just one
def test_fp16_loses_no_more_than_the_naive_path_does(fused: KernelBackend, shape: tuple) -> None:
    inputs = make_inputs(*shape[:5])
    ours, naives = errors(fused, inputs, selection(inputs, shape[5]), torch.float16)
    assert all(a < 2 * b for a, b in zip(ours, naives, strict=True)), (ours, naives)


@pytest.mark.parametrize("filled", [32, 64])
def test_sequences_of_a_few_rows_more_than_fill_a_tile(fused: KernelBackend, filled: int) -> None:
    """Backward computes sequences of up to 32 (64) rows in one tile, those of more in one of 64 (in tiles of 16)."""
    most = filled * 5 // 4
    inputs, counts = make_inputs(2, 96, 2, 16, 8), torch.tensor([[filled + 1, filled], [most, 0]])
    indices = selection(inputs, most).masked_fill(torch.arange(most) >= counts[..., None], 96)
    ours, naives = errors(fused, inputs, indices, torch.float16)
    assert all(a < 2 * b for a, b in zip(ours, naives, strict=True)), (ours, naives)


@pytest.mark.parametrize(
    ("scope", "restart_rotary", "is_one_tile"),
    [
        ("sequence", False, True),
        ("sequence", True, False),
        ("document", False, False),
        ("document", True, True),
    ],
)
def test_documents_and_empty_slots(
    fused: KernelBackend, scope: str, restart_rotary: bool, is_one_tile: bool, request: pytest.FixtureRequest
) -> None:
    if not is_one_tile:  # of slots; a document's queries then meet tiles of keys none of which they see
        request.getfixturevalue("small_tiles")
    inputs, documents = make_inputs(3, 9, 2, 10, 6), pack([[3, 1, 5], [9], [5, 4]])
    scores = naive.router_scores(inputs[0], inputs[1]).detach()
    indices = naive.select_tokens(scores, 6, True, documents.starts)
    if scope == "document":
        chosen = documents.selection(lambda length: num_selected_tokens(length, 1.4))
        indices = naive.select_tokens(scores, chosen.num_slots, True, documents.starts, chosen.quotas)
        assert (indices == 9).any() and chosen.num_slots > 4
    ours, _ = errors(fused, inputs, indices, documents=documents, restart_rotary=restart_rotary)
    assert max(ours) < 1e-5


@pytest.mark.parametrize("include_first_token", [False, True])
@pytest.mark.parametrize("name", ["ties", "all equal", "all different", "skewed"])
def test_selection_on_ties(fused: KernelBackend, name: str, include_first_token: bool) -> None:
    """One block of scores; test_blocks.py has several."""
    generator = torch.Generator().manual_seed(0)
    scores = {
        "ties": torch.randint(0, 5, (2, 2, 37), generator=generator) / 5 + 0.1,
        "all equal": torch.full((1, 1, 32), 0.5),
        "all different": torch.rand(1, 2, 37, generator=generator),
        "skewed": torch.rand(1, 2, 200, generator=generator) ** 30,  # a straight line between two counts is far off
    }[name]
    length = scores.shape[-1]
    for num_selected in (1, 2, length - 6, length):
        indices = fused.select_tokens(scores, num_selected, include_first_token)
        for b, e in ((b, e) for b in range(scores.shape[0]) for e in range(scores.shape[1])):
            included = [0] * include_first_token
            assert indices[b, e].tolist() == choose(scores[b, e].tolist(), num_selected, included)


@pytest.mark.parametrize("tiles", ["as they are chosen", "small"])
def test_rows_of_many_heads(tiles: str, request: pytest.FixtureRequest) -> None:
    """Two words of the bitmap, whose 32nd bit is a sign bit; with small tiles also several blocks of everything.

    Of three sequences two make a chunk, from whose beginning the rows of entries are counted.
    """
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    batch, length, heads, selected = 3, 10, 34, 5
    generator = torch.Generator().manual_seed(0)
    slots = torch.rand(batch, heads, length, generator=generator).argsort(-1)[..., :selected].sort(-1).values
    slots[0, 31:, 3:] = slots[2, :, 4:] = length  # empty
    found = rows_of(slots, length, 2)
    entries = [[[] for _ in range(length)] for _ in range(batch)]
    for e in range(heads):
        token_indices = []
        for b in range(batch):
            assert found.cu_seqlens[e, b] == len(token_indices)
            chunk_begin = int(found.cu_seqlens[e, b // 2 * 2])
            for token in slots[b, e].tolist():
                if token < length:
                    entries[b][token].append(e << 4 | len(token_indices) - chunk_begin)
                    token_indices.append(b << 4 | token)
        assert (
            found.cu_seqlens[e, batch] == len(token_indices)
            and found.token_indices[e, : len(token_indices)].tolist() == token_indices
        )
    ends = torch.tensor([len(of_token) for of_sequence in entries for of_token in of_sequence]).cumsum(0)
    assert found.offsets.tolist() == [0, *ends.tolist()]
    assert found.entries[: ends[-1]].tolist() == [
        entry for of_sequence in entries for of_token in of_sequence for entry in of_token
    ]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("size", "width", "offset", "is_described"),
    [
        (8, 24, 0, True),  # one tile of the summed dimension, three of columns, each stored in halves
        (12, 20, 0, True),  # remainders of both
        (16, 16, 1, False),  # weights that do not begin at 16 bytes
        (6, 11, 0, False),
    ],
)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_products_of_ragged_rows(
    size: int, width: int, offset: int, is_described: bool, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of 8 rows; chunks of two of five sequences and half of the columns, which begin amid the rows of a head."""
    monkeypatch.setattr(scattered, "WIDEST_STORE", 4)
    monkeypatch.setattr(scattered, "chunks_of", lambda *_: (2, -(-width // 8) * 4))
    batch, length, heads, selected = 5, 9, 4, 7
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([[0] * 5, [7] * 5, [5, 4, 0, 7, 1], [0, 0, 0, 3, 0]]).T  # none, all, more than a tile, one's
    slots = torch.rand(batch, heads, length, generator=generator).argsort(-1)[..., :selected]
    slots = torch.where(torch.arange(selected) < counts[..., None], slots, length).sort(-1).values.contiguous()
    rows = rows_of(slots, length, 2)
    numbers = torch.randn(heads * size * width + offset, generator=generator)[offset:]
    weight = numbers.view(heads, width, size).mT if is_transposed else numbers.view(heads, size, width)
    values, like = torch.full((heads, batch * selected, size), torch.nan), torch.zeros(batch, length, width)
    pairs = torch.full((*values.shape[:2], PAIR), torch.nan), torch.randn(heads, width, generator=generator)
    described = (values, weight.mT if is_transposed else weight, values.new_empty(1, 1, -(-width // 8) * 4))
    assert all(map(can_be_described, described)) == is_described
    expected = {None: torch.zeros_like(like), pairs: torch.zeros_like(like)}
    for e in range(heads):
        of_head = [(b, int(t)) for b in range(batch) for t in slots[b, e] if t < length]
        values[e, : len(of_head)] = torch.randn(len(of_head), size, generator=generator)
        pairs[0][e, : len(of_head), :2] = torch.randn(len(of_head), 2, generator=generator)
        for row, token in enumerate(of_head):
            product = values[e, row] @ weight[e]
            expected[None][token] += product
            expected[pairs][token] += product + pairs[0][e, row, :2].sum() * pairs[1][e]
    for given, wanted in expected.items():
        found = scattered.scattered_product(values, weight, rows, like, given)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_scores(fused: KernelBackend) -> None:
    states, weight = make_inputs(2, 150, 70, 40, 8)[:2]
    found = fused.router_scores(states.float(), weight.float())
    torch.testing.assert_close(found.double(), naive.router_scores(states, weight), rtol=1e-5, atol=1e-7)


def test_results_are_bitwise_reproducible_whatever_the_strides(fused: KernelBackend) -> None:
    inputs = [tensor.detach().float() for tensor in make_inputs(2, 5, 2, 10, 6)]

    def run(states: torch.Tensor) -> list[torch.Tensor]:
        states = states.detach().requires_grad_()
        weights = [tensor.detach().requires_grad_() for tensor in inputs[1:]]
        output = mosa_attention(states, *weights, num_selected=3, backend="triton")
        return [output, *torch.autograd.grad(output.square().sum(), [states, *weights])]

    first = run(inputs[0])
    for states in (inputs[0], inputs[0].transpose(0, 1).contiguous().transpose(0, 1), inputs[0].mT.contiguous().mT):
        for ours, theirs in zip(run(states), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("small_tiles")  # 8 columns of a chunk are a tile
def test_chunks_of_the_sum_over_heads_do_not_change_it(fused: KernelBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(3, 3, 2, 18, 6)]

    def run(chunk: tuple[int, int]) -> list[torch.Tensor]:
        monkeypatch.setattr(scattered, "chunks_of", lambda *_: chunk)
        output = mosa_attention(*inputs, num_selected=2, backend="triton")
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    whole = run((3, 18))
    # The interpreter multiplies by NumPy, which rounds blocks of other shapes otherwise on some processors; that a GPU
    # gives the same bits is tested there.
    for cut in (
        (2, 18),  # two sequences, and then one
        (1, 12),  # one after the other; 12 of their columns are a tile and a half, then 6 less than one
        (3, 5),  # three odd slices of columns, and 3 columns
    ):
        for ours, theirs in zip(run(cut), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def bytes_of(width: int) -> torch.Tensor:
    """States whose products have one byte per column."""
    return torch.empty(1, 1, width, dtype=torch.int8, device="meta")


@pytest.mark.parametrize(
    ("width", "fewest", "most_bytes", "chunk"),
    [
        (144, 1, 1 << 20, (5, 144)),  # all
        (144, 2, 1 << 20, (2, 144)),  # two of five sequences: three would be more than half
        (144, 1, 4 * 144, (3, 144)),  # three and two, not four and one
        (1152, 1, 1800, (2, 640)),  # three have 1920 columns, because these are rounded up
        (144, 1, 144, (1, 144)),  # one is just as much as is allowed
        (144, 1, 1, (1, 128)),  # slices of 128 columns, although one column were too much
        (144, 4, 1, (1, 16)),  # a quarter of 144 is less
        (72, 1, 1, (1, 16)),
        (6, 1, 1, (1, 1)),
        (6, 1, 3, (1, 3)),  # a half
    ],
)
def test_sequences_and_columns_of_a_chunk(
    width: int, fewest: int, most_bytes: int, chunk: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five sequences of one product, with one byte per column."""
    monkeypatch.setattr(scattered, "SMALL_BYTES", 0)
    monkeypatch.setattr(scattered, "FEWEST_CHUNKS", fewest)
    monkeypatch.setattr(scattered, "MOST_BYTES", most_bytes)
    assert scattered.chunks_of((5, 1, 1), bytes_of(width)) == chunk


@pytest.mark.parametrize(
    ("selected", "forward", "backward"),
    [(16, 16, 16), (32, 16, 32), (33, 16, 64), (48, 16, 64), (49, 64, 64), (64, 64, 64), (65, 64, 16), (97, 64, 64)],
)
def test_tiles_of_attention(selected: int, forward: int, backward: int) -> None:
    for is_backward, expected in ((False, forward), (True, backward)):
        chosen = tiles.attention(torch.bfloat16, torch.device("cpu"), selected, 64, is_backward)
        assert chosen["BLOCK"] == expected
        for dtype, width in ((torch.float32, 64), (torch.bfloat16, 128)):
            chosen = tiles.attention(dtype, torch.device("cpu"), 80, width, is_backward)
            assert chosen["BLOCK"] in (32, 64)


def test_rows_that_fill_one_tile_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, device = (32, 33, 48, 49, 64, 65, 96, 97), torch.device("cpu")
    found = [tiles.few_rows(torch.bfloat16, device, selected, 64) for selected in sizes]
    assert found == [0, 32, 32, 0, 0, 64, 64, 0]
    assert tiles.few_rows(torch.float32, device, 80, 64) == tiles.few_rows(torch.bfloat16, device, 80, 128) == 0
    monkeypatch.setattr(tiles, "shared_memory", lambda device: 99 << 10)  # too little for a tile of 64
    assert tiles.few_rows(torch.bfloat16, device, 80, 64) == 0


def test_few_bytes_are_one_chunk() -> None:
    rows = scattered.SMALL_BYTES // (4 * 64)
    assert scattered.chunks_of((4, 1, rows), bytes_of(64)) == (4, 64)
    assert scattered.chunks_of((4, 1, rows + 1), bytes_of(64)) == (1, 64)
    twice = 2 * scattered.SMALL_BYTES  # prompts split no smaller chunks
    assert scattered.chunks_of((1, 8, rows), bytes_of(64), twice) == (1, 64)
    assert scattered.chunks_of((1, 9, rows), bytes_of(64), twice) == (1, 32)


def test_no_chunk_is_more_than_half_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scattered, "SMALL_BYTES", 0)
    for width in range(2, 1200):
        for batch in (1, 2, 3, 4, 9):
            sequences, columns = scattered.chunks_of((batch, 10, 100), bytes_of(width))
            assert sequences * columns <= batch * (width + 1) // 2


def test_no_gradients_are_allocated_for_saved_activations(fused: KernelBackend) -> None:
    """Autograd would allocate zeros for these gradients, as much memory as is kept."""
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(2, 6, 3, 16, 8)]
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


def test_schemas_fake_kernels_and_autograd_of_the_operators(fused: KernelBackend) -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(2, 3, 2, 8, 4)]
    scores = fused.router_scores(inputs[0], inputs[1])
    operators = torch.ops.megatron_mosa
    indices = fused.select_tokens(scores, 2)
    calls = {
        operators.fused_router_scores: (inputs[0].detach(), inputs[1].detach()),
        operators.fused_select_tokens: (scores, 2, True),
        operators.fused_attention: (
            *inputs[:2], scores, indices, *inputs[2:], 0.5, 100.0, None, False, True,
            torch.randn(2, 3, 8).requires_grad_(),
        ),
    }  # fmt: skip
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    for operator, arguments in calls.items():
        found = torch.library.opcheck(operator, arguments, test_utils=checks)  # raises at the first failure
        assert found == dict.fromkeys(checks, "SUCCESS"), operator


def test_a_compiled_program_is_one_graph(fused: KernelBackend) -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(2, 3, 2, 8, 4)]

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        return mosa_attention(*tensors, num_selected=2, backend="triton")

    outputs = [layer(*inputs), torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)]
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    for ours, theirs in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert torch.equal(ours, theirs)


def test_flops_are_those_of_the_naive_path(fused: KernelBackend) -> None:
    inputs = [tensor.detach().float().requires_grad_() for tensor in make_inputs(2, 6, 3, 16, 8)]

    def count(backend: str) -> int:
        with FlopCounterMode(display=False) as counter:
            output = mosa_attention(*inputs, num_selected=5, backend=backend)
            output.sum().backward()
        return counter.get_total_flops()

    # The naive path's router has a dense gradient of two products more; the gates' gradient is no product here.
    dense_router = 2 * 2 * 2 * 6 * 16 * 3
    assert count("triton") == count("naive") - dense_router


def test_bad_states_are_refused(fused: KernelBackend) -> None:
    inputs = make_inputs(1, 8, 2, 4, 4)
    with pytest.raises(ValueError, match="backend='triton' does not run here: hidden_states is torch.float64"):
        mosa_attention(*inputs, num_selected=3, backend="triton")
    with pytest.raises(ValueError, match="backend='cuda' is not known"):
        mosa_attention(*inputs, num_selected=3, backend="cuda")
