"""torch.autocast takes products to bf16, and leaves scores, selection, thresholds and softmax where they were: fp32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mosa.attention import mosa_attention
from megatron_mosa.config import load_config
from megatron_mosa.convert.logits import single_process_groups
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.sparse_mosa import MosaHeads
from megatron_mosa.hf.tokens_mosa import Tokens, rotary_tables
from megatron_mosa.kernels import get_backend, naive
from megatron_mosa.kernels.naive import select_tokens
from megatron_mosa.model import build_empty_model
from tests.conversion.models import CAUSAL, KINDS, QUICKSTART, TINY
from tests.kernels.reference import mosa_reference
from tests.kernels.test_thresholds import select_above

BATCH, LENGTH, HEADS, WIDTH, SIZE, SELECTED = 2, 40, 3, 32, 16, 10
BACKENDS = ("naive", "triton")


def tensors() -> list[Tensor]:
    """States, router, W_QKV and W_O in fp32; all but the router's lose nothing in bf16."""
    generator = torch.Generator().manual_seed(22)  # of which heads would choose other tokens by scores in bf16
    shapes = ((BATCH, LENGTH, WIDTH), (HEADS, WIDTH), (HEADS, WIDTH, 3 * SIZE), (HEADS, SIZE, WIDTH))
    drawn = [
        torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if place else 1)
        for place, shape in enumerate(shapes)
    ]
    return [tensor if place == 1 else tensor.bfloat16().float() for place, tensor in enumerate(drawn)]


def exact_scores(states: Tensor, router: Tensor) -> Tensor:
    """[B, E, T] in fp64."""
    return torch.sigmoid(torch.einsum("bth,eh->bet", states.double(), router.double()))


def rounded_scores(states: Tensor, router: Tensor) -> Tensor:
    """[B, E, T], as bf16 would have them."""
    return torch.sigmoid(states.bfloat16() @ router.T.bfloat16()).mT


def autocast(enabled: bool = True) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def between(scores: Tensor, rounded: Tensor) -> Tensor:
    """Return thresholds, fp32 [E], above about a quarter of the scores, each between a score and its bf16 rounding."""
    ranked, order = scores.transpose(0, 1).flatten(1).sort(dim=-1)  # [E, B * T]
    moved = rounded.double().transpose(0, 1).flatten(1).gather(1, order) - ranked
    places = slice(ranked.shape[1] * 5 // 8, ranked.shape[1] * 7 // 8)
    furthest = moved[:, places].abs().argmax(dim=-1, keepdim=True)
    # Close to the score, so that a threshold in bf16 would be on the other side, too.
    beside = ranked + moved.clamp(-1e-5, 1e-5)
    return beside[:, places].gather(1, furthest)[:, 0].float()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_stay_fp32(backend: str) -> None:
    states, router, _, _ = tensors()
    expected = exact_scores(states, router)
    with autocast():
        found = get_backend(backend, states, SIZE).router_scores(states, router)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-6
    assert (rounded_scores(states, router).double() - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("backend", "part"), [("naive", "states"), ("naive", "router"), ("triton", "states")])
def test_scores_are_of_what_was_not_rounded(backend: str, part: str) -> None:
    """The output is 0 at tokens that the one head does not take."""
    _, *weights = (tensor[:1] for tensor in tensors())
    states = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    scores = exact_scores(states, weights[0])
    if part == "states":
        rounded = exact_scores(states.bfloat16(), weights[0])
    else:
        rounded = exact_scores(states, weights[0].bfloat16())
    thresholds = between(scores, rounded)
    with autocast():
        found = mosa_attention(states, *weights, thresholds=thresholds, backend=backend)
    expected, others = scores[:, 0] > thresholds, rounded[:, 0] > thresholds
    assert not torch.equal(expected, others)
    expected[:, 0] = True
    assert torch.equal(found.any(dim=-1), expected)


@torch.no_grad()
def test_gates_and_the_sum_over_heads_stay_fp32() -> None:
    """In sequences of one token, attention returns the value, so the gated result must be bitwise equal."""
    states = tensors()[0].flatten(0, 1)[:, None, :SIZE]  # [B * T, 1, h'], exact in bf16
    router = tensors()[1][:, :SIZE]
    identity = torch.eye(SIZE).expand(HEADS, -1, -1)
    qkv = torch.cat((torch.zeros(HEADS, SIZE, 2 * SIZE), identity), dim=-1)
    gated = (states[:, None] * get_backend("naive", states, SIZE).router_scores(states, router)[..., None]).bfloat16()
    expected = gated.float().sum(dim=1)
    config = MosaConfig(hidden_size=SIZE, head_dim=SIZE, num_mosa_heads=HEADS)
    heads = MosaHeads(config)
    for parameter, values in ((heads.router_weight, router), (heads.qkv_weight, qkv), (heads.proj_weight, identity)):
        parameter.copy_(values)
    positions = torch.zeros(1, 1, dtype=torch.long)
    with autocast():
        found = mosa_attention(states, router, qkv, identity, num_selected=1, backend="naive")
        exported = heads(states, Tokens(positions, rotary_tables(positions, config)), None)
    assert torch.equal(found, expected.bfloat16()) and torch.equal(exported, expected)


def test_the_naive_kernel_computes_in_the_types_of_its_operands() -> None:
    states, router, qkv, proj = tensors()
    kernels = get_backend("naive", states, SIZE)
    scores = kernels.router_scores(states, router)
    operands = (states, router, scores, kernels.select_tokens(scores, SELECTED), qkv, proj)
    found = []
    for enabled in (False, True):
        with autocast(enabled):
            found.append(kernels.selected_attention(*operands, rotary_percent=0.5, rotary_base=100.0))
    assert torch.equal(*found)


def test_softmax_denominators_stay_fp32() -> None:
    """The fused kernel returns their base-2 logarithms, and queries and keys in bf16."""
    states, router, qkv, proj = tensors()
    kernels = get_backend("triton", states, SIZE)
    scores = kernels.router_scores(states, router)
    indices = kernels.select_tokens(scores, LENGTH)
    operands = (states.bfloat16(), router, scores, indices, 2 * qkv.bfloat16(), proj.bfloat16())
    with autocast():
        _, projected, _, found, *_ = torch.ops.megatron_mosa.fused_attention(
            *operands, 0.5, 100.0, None, False, False, None
        )
    query, key, _ = projected.double().view(HEADS, BATCH, LENGTH, 3, SIZE).unbind(3)
    logits = query @ key.mT * SIZE**-0.5
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
    expected = logits.masked_fill(hidden, -torch.inf).logsumexp(-1) / math.log(2)
    assert projected.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert (found.view_as(expected) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("selection", ["expert_choice", "threshold"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_of_one_s_own(backend: str, selection: str) -> None:
    """Against the loop in fp64: with another selection whole tokens would differ."""
    inputs = [tensor.requires_grad_() for tensor in tensors()]
    scores, rounded = exact_scores(*inputs[:2]).detach(), rounded_scores(*inputs[:2]).detach()
    options: dict[str, Any] = {"num_selected": SELECTED, "include_first_token": True}
    if selection == "threshold":
        options = {"thresholds": between(scores, rounded)}
    else:
        assert not torch.equal(select_tokens(rounded, SELECTED, True), select_tokens(scores, SELECTED, True))
    with autocast():
        found = mosa_attention(*inputs, **options, rotary_base=100.0, backend=backend)
        again = mosa_attention(inputs[0].bfloat16(), *inputs[1:], **options, rotary_base=100.0, backend=backend)
    plain = mosa_attention(*inputs, **options, rotary_base=100.0, backend="naive")
    assert (found.dtype, plain.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(again, found)  # the states are the same in bf16
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    expected = plain
    if selection == "expert_choice":
        doubled = [tensor.detach().double().requires_grad_() for tensor in inputs]
        expected = mosa_reference(*doubled, **options, rotary_percent=0.5, rotary_base=100.0)
    else:
        doubled = inputs
    assert 0 < relative(found, expected) < 0.02  # the interpreter cuts bf16 off, where a GPU rounds
    gradients = torch.autograd.grad(found, inputs, upstream.to(found))
    exact = torch.autograd.grad(expected, doubled, upstream.to(expected))
    for gradient, right in zip(gradients, exact, strict=True):
        assert gradient.dtype == torch.float32 and relative(gradient, right) < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["expert_choice", "threshold"])
def test_the_heads_of_a_megatron_layer(backend: str, kind: str) -> None:
    options = [*CAUSAL, "mosa.load_feedback=0"] if kind == "threshold" else KINDS["pure"]
    config = load_config(QUICKSTART, [*TINY, *options, "data.path=none", f"mosa.backend={backend}"])
    with single_process_groups(config):
        model = build_empty_model(config, 300).eval()
        heads = model.decoder.layers[0].self_attention.mosa_heads
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(LENGTH, BATCH, 24, generator=generator)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        expected = exact_scores(states.transpose(0, 1), heads.router_weight)
        if kind == "threshold":
            heads.thresholds.copy_(between(expected, rounded_scores(states.transpose(0, 1), heads.router_weight)))
            heads.threshold_updates.fill_(1)
            thresholds = heads.thresholds.clone()
    heads.records_selection = True
    found = {}
    for enabled in (False, True):
        with autocast(enabled):
            output = heads(states)
        output.float().sum().backward()
        scores, indices = heads.selection
        assert scores.dtype == torch.float32 and (scores - expected).abs().max() < 1e-6
        found[enabled] = output, indices
        if kind == "threshold":
            right = select_above(naive, scores, thresholds, None)
        else:
            right = select_tokens(scores, indices.shape[2], True)
        assert torch.equal(indices, right)
    assert torch.equal(found[True][1], found[False][1])
    assert found[True][0].dtype == torch.bfloat16 and 0 < relative(found[True][0], found[False][0]) < 0.02
    assert all(parameter.grad.dtype == torch.float32 for parameter in heads.parameters())
    if kind == "threshold":
        assert heads.thresholds.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("selection", ["expert_choice", "threshold"])
def test_the_heads_of_an_exported_model(selection: str) -> None:
    states, router, qkv, proj = tensors()
    sizes = {"hidden_size": WIDTH, "head_dim": SIZE, "num_mosa_heads": HEADS, "sparsity": LENGTH / SELECTED}
    config = MosaConfig(**sizes, selection=selection, rotary_base=100.0)  # pyright: ignore[reportArgumentType]
    heads = MosaHeads(config)
    for parameter, values in zip(
        (heads.router_weight, heads.qkv_weight, heads.proj_weight), (router, qkv, proj), strict=True
    ):
        parameter.copy_(values)
    expected = exact_scores(states, router)
    if heads.thresholds is not None:
        heads.thresholds.copy_(between(expected, rounded_scores(states, router)))
    positions = torch.arange(LENGTH)[None]
    tokens = Tokens(positions, rotary_tables(positions, config))
    with autocast():
        scores, found = heads.scores(states), heads(states, tokens, None)
    assert scores.dtype == torch.float32 and (scores - expected).abs().max() < 1e-6
    chosen = heads.select(scores, tokens, None)
    if heads.thresholds is not None:
        assert torch.equal(chosen, select_above(naive, expected.float(), heads.thresholds, None))
    else:
        assert torch.equal(chosen, select_tokens(expected.float(), SELECTED, True))
    if selection == "expert_choice":
        doubled = [tensor.double() for tensor in (states, router, qkv, proj)]
        options: dict[str, Any] = {"num_selected": SELECTED, "include_first_token": True, "rotary_percent": 0.5}
        right = mosa_reference(*doubled, **options, rotary_base=100.0)
    else:
        right = heads(states, tokens, None)
    assert 0 < relative(found, right) < 0.01


def test_scores_of_a_device_that_knows_no_autocast() -> None:
    """Such as meta, on which models are laid out before they have memory."""
    heads = MosaHeads(MosaConfig(hidden_size=WIDTH, head_dim=SIZE, num_mosa_heads=HEADS)).to("meta")
    assert heads.scores(torch.empty(BATCH, LENGTH, WIDTH, device="meta")).shape == (BATCH, HEADS, LENGTH)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_one_graph_under_torch_compile(backend: str, enabled: bool) -> None:
    def layer(base: float, *given: Tensor) -> Tensor:
        with autocast(enabled):
            return mosa_attention(*given, num_selected=SELECTED, rotary_base=base, backend=backend)

    states, *weights = tensors()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for base, length in ((1e4, LENGTH), (2e4, LENGTH - 1)):  # from the second call on, both are symbols
        given = (base, states[:, :length], *weights)
        assert torch.equal(compiled(*given), layer(*given))
