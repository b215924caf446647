"""FLOPs and parameter counts against torch's FlopCounterMode and the built model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_mosa.config import Config, config_from_dict, padded_vocab_size
from megatron_mosa.model import (
    build_model,
    dense_head_flops,
    model_flops,
    mosa_head_flops,
    paper_flops,
    parameter_count,
)
from megatron_mosa.parallel import Layout

VOCAB_SIZE = 200


def make_config(
    dense: int, mosa: int, length: int = 40, sparsity: float = 6.0, ffn: int | None = None, **model: object
) -> Config:
    return config_from_dict(
        {
            "run": {"name": "costs"},
            "model": dict(
                num_layers=3, hidden_size=32, num_dense_heads=dense, head_dim=16, ffn_hidden_size=ffn, **model
            ),
            "mosa": dict(num_heads=mosa, sparsity=sparsity),
            "data": dict(path="unused", sequence_length=length),
            "train": dict(steps=1, micro_batch_size=2, global_batch_size=2, precision="fp32"),
        }
    )


def counted_flops(config: Config, backward: bool = False) -> int:
    """Return the FLOPs that FlopCounterMode counts for one sequence."""
    model = build_model(config, VOCAB_SIZE)
    tokens = torch.arange(config.data.sequence_length)[None]
    # The counter does not count the CPU's fused attention; the plain one consists of two T x T matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(tokens, tokens, None, labels=tokens).sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("dense", "mosa", "ffn"), [(2, 0, None), (0, 5, None), (2, 5, 48)])
def test_paper_flops_equal_the_counted_ones(layout: Layout, dense: int, mosa: int, ffn: int | None) -> None:
    config = make_config(dense, mosa, ffn=ffn)
    length, selected = config.data.sequence_length, 6
    vocabulary = 2 * 32 * padded_vocab_size(VOCAB_SIZE, 128) * length
    gates = 3 * mosa * 16 * selected  # h' k per head and layer: elementwise, which the counter does not count
    assert paper_flops(config) == counted_flops(config) - vocabulary + gates


@pytest.mark.parametrize(("dense", "mosa"), [(2, 0), (0, 5), (2, 5)])
def test_model_flops_are_the_counted_ones_without_needless_work(layout: Layout, dense: int, mosa: int) -> None:
    config = make_config(dense, mosa)
    length, selected, hidden, head_dim, layers = 40, 6, 32, 16, 3
    needed = model_flops(config, VOCAB_SIZE)
    # backward costs twice the forward, except for what is subtracted below
    executed = 3 * counted_flops(config)
    padding = 3 * 2 * hidden * (padded_vocab_size(VOCAB_SIZE, 128) - VOCAB_SIZE) * length
    future = {n: sum(1 for q in range(n) for k in range(n) if k > q) for n in (length, selected)}  # query, key pairs
    dense_future = layers * dense * 3 * 4 * head_dim * future[length]
    mosa_future = layers * mosa * 3 * 4 * head_dim * future[selected]
    # dx and dw of the router: the counter sees T tokens, of which only k have a gradient
    router = layers * mosa * 4 * hidden * (length - selected)
    assert needed == executed - padding - dense_future - mosa_future - router


def test_paper_numbers() -> None:
    """The paper prints forward GFLOPs per sequence for its dense models: 54.76, 219.85, 1130.65."""
    for layers, hidden, heads, printed in ((6, 512, 9, 54.76), (9, 1024, 9, 219.85), (27, 1280, 16, 1130.65)):
        total = layers * (heads * dense_head_flops(hidden, 64, 1024) + 16 * hidden**2 * 1024)
        assert round(total / 1e9, 2) == printed


def test_a_mosa_head_costs_less_than_a_dense_one_from_sparsity_2_on() -> None:
    for sparsity in (2, 4, 8, 16, 32):
        assert mosa_head_flops(512, 64, 1024, 1024 // sparsity) < dense_head_flops(512, 64, 1024)


@pytest.mark.parametrize(("dense", "mosa", "ffn"), [(2, 0, None), (0, 5, 48), (2, 5, None)])
def test_parameter_count_is_that_of_the_built_model(layout: Layout, dense: int, mosa: int, ffn: int | None) -> None:
    config = make_config(dense, mosa, ffn=ffn)
    built = sum(parameter.numel() for parameter in build_model(config, VOCAB_SIZE).parameters())
    assert parameter_count(config, VOCAB_SIZE) == built


VARIANTS = [
    dict(num_query_groups=1),
    dict(num_local_heads=3, local_window=7),
    dict(activation="swiglu"),
    dict(normalization="RMSNorm"),
    dict(tie_embeddings=True),
]


@pytest.mark.parametrize("model", VARIANTS, ids=lambda model: next(iter(model)))
def test_variants_of_the_model(layout: Layout, model: dict) -> None:
    config, plain = make_config(2, 5, **model), make_config(2, 5)
    built = sum(parameter.numel() for parameter in build_model(config, VOCAB_SIZE).parameters())
    assert parameter_count(config, VOCAB_SIZE) == built
    # The difference to the plain model. Local heads run in blocks, so a test below computes theirs by hand.
    if "num_local_heads" not in model:
        assert paper_flops(config) - paper_flops(plain) == counted_flops(config) - counted_flops(plain)
        difference = model_flops(config, VOCAB_SIZE) - model_flops(plain, VOCAB_SIZE)
        assert difference == 3 * (counted_flops(config) - counted_flops(plain))


@pytest.mark.parametrize("scope", ["sequence", "document"])
def test_cost_of_attention_within_documents(scope: str) -> None:
    plain = make_config(2, 5, num_local_heads=3, local_window=7)
    config = make_config(2, 5, num_local_heads=3, local_window=7, attend_within_documents=True)
    config.mosa.selection_scope = scope
    assert model_flops(config, VOCAB_SIZE) == model_flops(plain, VOCAB_SIZE)  # one document per sequence
    lengths, length, hidden, head_dim, layers = [20, 5, 15], 40, 32, 16, 3

    def pairs(sizes: list[float], window: int = 40) -> float:
        return sum(min(query + 1, window) for size in sizes for query in range(int(size)))

    dense = 2 * 3 * 4 * head_dim * (pairs([40]) - pairs(lengths))
    local = 3 * 3 * 4 * head_dim * (pairs([40], 7) - pairs(lengths, 7))
    selected = [3, 2, 2] if scope == "document" else [3.0, 0.75, 2.25]  # 6 of 40, spread evenly; at least 2 of each
    seen = sum(size * (size + 1) / 2 for size in selected)
    mosa = 5 * 3 * 4 * head_dim * (pairs([6]) - seen)
    rows = sum(selected) - 6
    mosa -= 5 * (3 * 8 * hidden * head_dim + 4 * hidden) * rows
    saved = model_flops(plain, VOCAB_SIZE) - model_flops(config, VOCAB_SIZE, [lengths])
    assert saved == layers * (dense + local + mosa)
    assert model_flops(config, VOCAB_SIZE, [lengths, [length]]) == model_flops(plain, VOCAB_SIZE) - saved / 2
    assert model_flops(plain, VOCAB_SIZE, [lengths]) == model_flops(plain, VOCAB_SIZE)  # which ignores documents


def test_cost_of_local_heads() -> None:
    config, plain = make_config(2, 5, num_local_heads=3, local_window=7), make_config(2, 5)
    length, hidden, head_dim, layers = 40, 32, 16, 3
    pairs = sum(1 for query in range(length) for key in range(length) if query - 7 < key <= query)
    executed = layers * 3 * 3 * (8 * hidden * head_dim * length + 4 * head_dim * pairs)
    assert model_flops(config, VOCAB_SIZE) - model_flops(plain, VOCAB_SIZE) == executed
    in_full = layers * 3 * (8 * hidden * head_dim * length + 4 * head_dim * length * 7)
    assert paper_flops(config) - paper_flops(plain) == in_full
