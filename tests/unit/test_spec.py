"""The layer spec in a GPTModel that the user builds without this project's trainer."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mosa.attention import (
    MosaSelfAttention,
    MosaTransformerConfig,
    get_mosa_block_spec,
    get_mosa_layer_spec,
    mosa_attention,
)
from megatron_mosa.attention.causal_heads import DenseHeads
from megatron_mosa.kernels import Documents, naive
from megatron_mosa.parallel import Layout, tensor_parallel_group


def make_config(**changes: object) -> MosaTransformerConfig:
    settings: dict = dict(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
        kv_channels=8,
        num_mosa_heads=6,
        mosa_sparsity=4.0,
        mosa_rotary_percent=0.5,
        use_cpu_initialization=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return MosaTransformerConfig(**settings | changes)


def build_gpt(config: MosaTransformerConfig, spec: object) -> GPTModel:
    return GPTModel(config, spec, vocab_size=64, max_sequence_length=16, position_embedding_type="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["layer", "block"])
def test_a_gpt_model_built_by_hand_learns(layout: Layout, kind: str) -> None:
    torch.manual_seed(0)
    config = make_config()
    model = build_gpt(config, get_mosa_layer_spec(config) if kind == "layer" else get_mosa_block_spec(config))
    tokens = torch.randint(0, 64, (4, 17))
    positions = torch.arange(16).expand(4, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_hybrid_layer_is_dense_attention_plus_mosa_attention(layout: Layout) -> None:
    torch.manual_seed(0)
    config = make_config(params_dtype=torch.float64)
    layer = MosaSelfAttention(config)
    states = torch.randn(13, 3, 32, dtype=torch.float64)  # [T, B, h]
    output, bias = layer(states)
    assert bias is None and output.shape == states.shape
    assert layer.mosa_heads is not None and layer.dense_heads is not None
    mosa = mosa_attention(
        states.transpose(0, 1),
        layer.mosa_heads.router_weight,
        layer.mosa_heads.qkv_weight,
        layer.mosa_heads.proj_weight,
        num_selected=3,
    )
    expected = mosa.transpose(0, 1) + plain_dense_attention(layer.dense_heads, states)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


def test_grouped_queries_are_dense_heads_that_share_keys_and_values(layout: Layout) -> None:
    torch.manual_seed(0)
    grouped = DenseHeads(
        make_config(num_attention_heads=4, num_query_groups=2, params_dtype=torch.float64), tensor_parallel_group()
    )
    dense = DenseHeads(make_config(num_attention_heads=4, params_dtype=torch.float64), tensor_parallel_group())
    rows = grouped.qkv_weight.detach().view(2, 4, 8, 32)  # [groups, q q k v, h', h]
    with torch.no_grad():
        for head in range(4):
            group = rows[head // 2]
            dense.qkv_weight.view(4, 3, 8, 32)[head] = torch.stack((group[head % 2], group[2], group[3]))
        dense.proj_weight.copy_(grouped.proj_weight)
    states = torch.randn(13, 3, 32, dtype=torch.float64)
    torch.testing.assert_close(grouped(states), dense(states), rtol=1e-10, atol=1e-12)


def test_local_heads_see_their_window_and_no_more(layout: Layout) -> None:
    torch.manual_seed(0)
    layer = MosaSelfAttention(
        make_config(num_attention_heads=0, num_mosa_heads=0, num_local_heads=2, mosa_local_window=4)
    )
    states = torch.randn(20, 1, 32)
    changed = states.clone()
    changed[9] = torch.randn(1, 32)
    same = [torch.allclose(layer(states)[0][t], layer(changed)[0][t], atol=1e-6) for t in range(20)]
    assert same == [not 9 <= t < 13 for t in range(20)]


@pytest.mark.parametrize("kind", ["dense", "local", "mosa", "all"])
@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_a_model_of_packed_documents_is_a_model_of_documents_alone(layout: Layout, kind: str, recompute: str) -> None:
    counts = {"dense": dict(num_attention_heads=2), "local": dict(num_local_heads=2), "mosa": dict(num_mosa_heads=6)}
    heads: dict = {"num_attention_heads": 0, "num_local_heads": 0, "num_mosa_heads": 0}
    heads |= counts["dense"] | counts["local"] | counts["mosa"] if kind == "all" else counts[kind]
    config = make_config(
        **heads, mosa_local_window=3, mosa_include_first_token=True, mosa_attend_within_documents=True,
        mosa_selection_scope="document", mosa_restart_rotary=True, mosa_recompute=recompute,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_gpt(config, get_mosa_block_spec(config))
    lengths = [[5, 4, 7], [1, 15]]
    starts = torch.tensor([[0] * 5 + [5] * 4 + [9] * 7, [0] + [1] * 15])
    tokens = torch.stack([torch.randperm(64)[:16] for _ in lengths])

    def gradients(losses: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        losses.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed = model(tokens, torch.arange(16).expand(2, 16), Documents.from_starts(starts), labels=tokens)  # [B, T]
    alone = []
    for row, sizes in zip(tokens, lengths, strict=True):
        for part in row.split(sizes):
            one = Documents.from_starts(torch.zeros(1, len(part), dtype=torch.int64))
            alone.append(model(part[None], torch.arange(len(part))[None], one, labels=part[None])[0])
    torch.testing.assert_close(packed.flatten(), torch.cat(alone), rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(packed), gradients(torch.cat(alone))
    assert len(ours) == len(list(model.parameters()))
    for gradient, expected in zip(ours, theirs, strict=True):
        assert expected.norm() > 0
        assert (gradient - expected).norm() < 1e-5 * expected.norm()


def plain_dense_attention(heads: DenseHeads, states: torch.Tensor) -> torch.Tensor:
    """Compute attention head by head, with an explicit score matrix."""
    length, head_dim = states.shape[0], heads.config.kv_channels
    weights = heads.qkv_weight.view(-1, 3, head_dim, states.shape[-1])  # [H, 3, h', h]
    outputs = []
    for head in range(weights.shape[0]):
        query, key, value = (states.transpose(0, 1) @ weights[head, i].T for i in range(3))  # [B, T, h']
        positions = torch.arange(length)
        query, key = (naive.apply_rotary(x, positions, 0.5, 10000.0) for x in (query, key))
        logits = query @ key.transpose(1, 2) / head_dim**0.5
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        outputs.append(logits.softmax(-1) @ value)
    return (torch.cat(outputs, dim=-1) @ heads.proj_weight.T).transpose(0, 1)


def test_dense_heads_are_causal_and_expert_choice_is_not(layout: Layout) -> None:
    torch.manual_seed(0)
    states = torch.randn(16, 1, 32)
    changed = states.clone()
    changed[9:] = torch.randn(7, 1, 32)
    for config, is_causal in ((make_config(num_mosa_heads=0), True), (make_config(num_attention_heads=0), False)):
        layer = MosaSelfAttention(config)
        same = torch.allclose(layer(states)[0][:9], layer(changed)[0][:9], atol=1e-6)
        assert same == is_causal


def test_any_sparsity_and_the_shortest_sequences(layout: Layout) -> None:
    for sparsity in (1.0, 1.5, 4.0, 7.3, 1000.0):
        layer = MosaSelfAttention(make_config(mosa_sparsity=sparsity))
        for length in (1, 2, 3, 17):
            assert layer(torch.randn(length, 2, 32))[0].isfinite().all()


def test_unsupported_arguments_of_the_layer(layout: Layout) -> None:
    layer = MosaSelfAttention(make_config())
    with pytest.raises(ValueError, match="position_embedding_type='none'"):
        layer(torch.randn(4, 1, 32), rotary_pos_emb=torch.zeros(4, 1, 1, 8))
    with pytest.raises(ValueError, match="packed_seq_params"):
        layer(torch.randn(4, 1, 32), packed_seq_params=object())
    layer = MosaSelfAttention(make_config(mosa_attend_within_documents=True))
    with pytest.raises(ValueError, match="attention_mask is a NoneType.*Documents"):
        layer(torch.randn(4, 1, 32))
    documents = Documents.from_starts(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"documents of \(1, 4\) tokens on cpu; expected \(2, 4\) on cpu"):
        layer(torch.randn(4, 2, 32), documents)
    with pytest.raises(ValueError, match="attention_mask is a Documents; expected .*=False: None"):
        MosaSelfAttention(make_config())(torch.randn(4, 1, 32), documents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_attention_heads=0, num_mosa_heads=0), "leave no head"),
        (dict(num_mosa_heads=-1), "num_mosa_heads must be at least 0, got -1"),
        (dict(kv_channels=-8), "kv_channels=-8; set it to the width of a head"),
        (dict(normalization="rmsnorm"), "normalization must be LayerNorm or RMSNorm, got rmsnorm"),
        (dict(mosa_recompute="full", hidden_dropout=0.1), "must be 0.0 with mosa_recompute='full', got 0.1"),
        (dict(num_fixed_heads=2), "mosa_fixed_stride must be at least 1 with fixed heads, got 0"),
        (dict(num_routing_heads=2), "mosa_routing_clusters must be at least 2 with Routing heads, got 0"),
        (
            dict(num_routing_heads=2, mosa_routing_clusters=4, mosa_routing_decay=1.5),
            "mosa_routing_decay must be at least 0 and at most 1, got 1.5",
        ),
        (dict(mosa_attention_gate=True, num_attention_heads=0), "gates dense and local heads, but there are none"),
        (dict(mosa_sparsity=0.5), "mosa_sparsity must be at least 1 and at most 16777216, got 0.5"),
        (dict(mosa_rotary_percent=1.5), "mosa_rotary_percent must be at least 0 and at most 1, got 1.5"),
        (dict(mosa_recompute="all"), "mosa_recompute must be one of none, attention, full, got all"),
        (dict(add_bias_linear=True), "no biases"),
        (dict(attention_dropout=0.1), "attention_dropout=0.1"),
        (dict(qk_layernorm=True), "qk_layernorm=True is not supported by MoSA layers; expected False"),
        (dict(num_moe_experts=4), "num_moe_experts=4 is not supported by MoSA layers; expected None"),
        (dict(softmax_type="learnable"), "softmax_type='learnable' is not .* expected 'vanilla'"),
        (dict(mosa_selection_scope="both"), "mosa_selection_scope must be one of sequence, document, got both"),
        (
            dict(mosa_selection="router"),
            "mosa_selection must be one of expert_choice, threshold, token_choice, got router",
        ),
        (dict(mosa_selection="threshold", mosa_selection_scope="document"), "does not support mosa_selection_scope"),
        (dict(mosa_capacity_factor=0.5), "mosa_capacity_factor must be at least 1 and at most 16777216, got 0.5"),
        (
            dict(mosa_selection="threshold", mosa_load_feedback=-0.1),
            "mosa_load_feedback must be at least 0 and at most 1000, got -0.1",
        ),
        (dict(mosa_load_feedback=0.1), "mosa_load_feedback needs mosa_selection='threshold'"),
        (dict(mosa_threshold_ema=0.0), "mosa_threshold_ema must be greater than 0 and at most 1, got 0.0"),
        (dict(mosa_threshold_warmup_steps=0), "mosa_threshold_warmup_steps must be at least 1, got 0"),
        (dict(mosa_selection_scope="document"), "need mosa_attend_within_documents"),
        (dict(mosa_restart_rotary=True), "need mosa_attend_within_documents"),
        (dict(num_attention_heads=4, num_mosa_heads=6, tensor_model_parallel_size=4), "num_mosa_heads=6"),
        (dict(context_parallel_size=2), "context_parallel_size=2"),
    ],
)
def test_bad_configurations_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_equal_weights_on_all_ranks_are_refused(layout: Layout) -> None:
    config = make_config(tensor_model_parallel_size=2, use_cpu_initialization=False)
    with pytest.raises(ValueError, match="would give every rank the same weights; set use_cpu_initialization=True"):
        MosaSelfAttention(config)
    make_config(
        tensor_model_parallel_size=2, use_cpu_initialization=False, perform_initialization=False
    ).check_initialization()


def test_process_groups_can_be_given(layout: Layout) -> None:
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
    assert MosaSelfAttention(make_config(), pg_collection=groups).tp_group is groups.tp
