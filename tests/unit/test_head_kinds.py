"""Each kind of attention heads: one test class, which inherits what must hold for all of them.

The classes compare with the kind written out in fp64, and between the ways in which this project computes it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_mosa.attention import KINDS, MosaSelfAttention, looks_ahead
from megatron_mosa.attention.config import HEAD_FIELDS
from megatron_mosa.attention.routing_heads import random_directions
from megatron_mosa.attention.thresholds import (
    forget_scores,
    is_causal,
    mosa_layers,
    routing_layers,
    selection_buffers,
    update_thresholds,
)
from megatron_mosa.attention.token_choice import choose_heads
from megatron_mosa.config import Config, head_counts
from megatron_mosa.convert.model_config import from_transformers, to_transformers
from megatron_mosa.convert.weights import model_weights
from megatron_mosa.hf.cache_mosa import ROWS
from megatron_mosa.hf.configuration_mosa import MosaConfig
from megatron_mosa.hf.heads_mosa import HEADS
from megatron_mosa.hf.modeling_mosa import CACHE, MosaForCausalLM
from megatron_mosa.kernels import Documents, get_backend, naive
from megatron_mosa.metrics import recorded_selection, selection_statistics
from megatron_mosa.model import (
    build_model,
    language_model_loss,
    model_flops,
    paper_flops,
    parameter_count,
    stored_tensors,
    transformer_config,
)
from megatron_mosa.model.mosa_gpt import MosaGPTModel
from megatron_mosa.parallel import Layout
from tests.distributed.tasks import VOCAB_SIZE, global_batch, tiny_config
from tests.head_kinds import OPTIONS
from tests.kernels.reference import mosa_reference
from tests.kernels.test_documents import masked_attention

LENGTH = 24  # of tiny_config
DOCUMENTS = [[5, 2, 17], [LENGTH]]


def test_every_list_of_kinds_is_the_same() -> None:
    """The configuration's, the layer's, and those of the exported model and its cache."""
    kinds = [kind.name for kind in KINDS]
    assert kinds == [word.lower() for word in head_counts(tiny_config())]
    assert kinds == list(HEAD_FIELDS) == list(HEADS) == list(ROWS)


def random_model(config: Config) -> MosaGPTModel:
    """Build a model whose attention matters, in evaluation mode."""
    model = build_model(config, VOCAB_SIZE).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            center = 0.0 if parameter.dim() > 1 else 1.0
            parameter.copy_(center + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def set_biases(model: MosaGPTModel) -> None:
    for name, buffer in selection_buffers(model).items():
        if name.endswith("head_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(5)))


def set_centroids(module: torch.nn.Module) -> None:
    for name, buffer in selection_buffers(module).items():
        if name.endswith("centroids"):
            random_directions(buffer, torch.Generator().manual_seed(6))


def random_tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(4))


def logits_of(model: MosaGPTModel, tokens: Tensor, documents: Documents | None = None) -> Tensor:
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), documents)


class HeadKindTests:
    """What must hold for every kind, and each of its options."""

    option: ClassVar[str]
    """The name of the model in ``tests.head_kinds.OPTIONS``."""

    causal: ClassVar[bool] = True
    """False: the kind looks ahead, which is asserted."""

    def truth(self, heads: Any, states: Tensor, visible: Tensor, lengths: list[list[int]]) -> Tensor:
        """Compute what heads contribute, [B, T, h] from [B, T, h], token by token or with a score matrix.

        Args:
            heads: their module, in fp64.
            visible: bool [B, T, T]: the key is in the query's document, and not after it.
            lengths: of the documents of each sequence.
        """
        raise NotImplementedError

    def uncounted_flops(self, config: Config) -> int:
        """Return the forward FLOPs of a layer that the paper's formulas count and torch's counter does not."""
        return 0

    def counted_config(self) -> Config:
        """Return the configuration whose FLOPs torch's counter counts in training."""
        return self.config

    @property
    def config(self) -> Config:
        return tiny_config(**{"train__micro_batch_size": 2, **OPTIONS[self.option]})

    @pytest.mark.parametrize("within", [False, True])
    def test_layer_is_the_kind_written_out(self, layout: Layout, within: bool) -> None:
        config = replace(self.config, model=replace(self.config.model, attend_within_documents=within))
        torch.manual_seed(0)
        layer = MosaSelfAttention(transformer_config(config, torch.float64))
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        set_centroids(layer)
        inputs = torch.randn(2, LENGTH, config.model.hidden_size, dtype=torch.float64, requires_grad=True)
        lengths = DOCUMENTS if within else [[LENGTH]] * 2
        documents = Documents.from_lengths(lengths)
        visible = (torch.arange(LENGTH) >= documents.starts.unsqueeze(-1)).expand(2, LENGTH, LENGTH).tril()
        found = layer(inputs.transpose(0, 1), documents if within else None)[0].transpose(0, 1)
        parts = [self.truth(getattr(layer, name), inputs, visible, lengths) for name in layer.present]
        expected = torch.stack(parts).sum(0)
        upstream = torch.randn_like(expected)
        of = [inputs, *layer.parameters()]
        ours, theirs = (torch.autograd.grad(output, of, upstream) for output in (found, expected))
        for gradient, wanted in zip([found, *ours], [expected, *theirs], strict=True):
            assert wanted.norm() > 0
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)

    def test_causality(self, layout: Layout) -> None:
        model, tokens = random_model(self.config), random_tokens()
        changed = tokens.clone()
        changed[:, 13:] = (changed[:, 13:] + 7) % VOCAB_SIZE
        with torch.no_grad():
            change = (logits_of(model, tokens) - logits_of(model, changed)).abs().amax(dim=(0, 2))
        assert change[13:].min() > 1e-2
        assert (change[:13].max() < 1e-5) == self.causal
        assert looks_ahead(self.config) == (not self.causal) == (not is_causal(model))

    def test_flops_of_the_paper_are_the_counted_ones(self, layout: Layout) -> None:
        config = self.counted_config()
        tokens = random_tokens(1)
        model = build_model(config, VOCAB_SIZE)
        # The counter does not count the CPU's fused attention; the plain one consists of two matrix products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            logits_of(model, tokens)
        vocabulary = 2 * config.model.hidden_size * 64 * LENGTH
        uncounted = config.model.num_layers * self.uncounted_flops(config)
        assert paper_flops(config) == counter.get_total_flops() - vocabulary + uncounted

    def test_parameter_count_and_names_are_those_of_the_model(self, layout: Layout) -> None:
        model = build_model(self.config, VOCAB_SIZE)
        assert parameter_count(self.config, VOCAB_SIZE) == sum(p.numel() for p in model.parameters())
        wanted = {weight.name: (weight.module_shape, weight.is_trained) for weight in model_weights(self.config, 64)}
        found = {
            name: (tuple(tensor.shape), is_trained) for name, (tensor, _, is_trained) in stored_tensors(model).items()
        }
        assert wanted == found

    @pytest.mark.parametrize("within", [False, True])
    @pytest.mark.parametrize("recompute", ["none", "attention", "full"])
    def test_compiled_layer_and_recompute_change_nothing(self, layout: Layout, recompute: str, within: bool) -> None:
        """The layer that GPUs compile is not compiled here."""
        config = self.config
        config = replace(
            config, model=replace(config.model, attend_within_documents=within),
            train=replace(config.train, recompute=recompute),
        )  # fmt: skip
        plain = replace(config, train=replace(config.train, recompute="none"))
        batch = {name: tensor[-2:] for name, tensor in global_batch(config, 0).items()}
        fused_loss = get_backend("triton", torch.empty(0)).linear_cross_entropy  # interpreted
        wanted = losses_and_gradients(build_model(plain, VOCAB_SIZE), batch)
        model = build_model(config, VOCAB_SIZE)
        for name, value in losses_and_gradients(model, batch).items():
            assert torch.equal(value, wanted[name]), name
        model.compile_layers(naive, fused_loss, backend=None)
        for name, value in losses_and_gradients(model, batch).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5 * wanted[name].abs().max().item())

    def test_exported_model_is_the_same_with_and_without_a_cache(self, layout: Layout) -> None:
        config, tokens = self.config, random_tokens(3)
        model = random_model(config)
        set_biases(model)
        theirs = to_transformers(config, 64)
        assert to_transformers(from_transformers(theirs | {"model_type": "mosa"})[0], 64) == theirs
        exported = MosaForCausalLM(MosaConfig(**theirs)).eval()
        assert exported.config.can_decode == self.causal
        ours = {name: stored.tensor for name, stored in stored_tensors(model).items()}
        state = {
            part: tensor
            for weight in model_weights(config, 64)
            for part, tensor in zip(
                weight.parts, weight.fusion.split(weight.from_module(ours[weight.name])), strict=True
            )
        }  # fmt: skip
        exported.load_state_dict(state)
        with torch.no_grad():
            wanted = logits_of(model, tokens)
            assert wanted.std() > 0.3  # not a comparison of flat distributions
            torch.testing.assert_close(exported(tokens).logits, wanted, rtol=0, atol=1e-4)
            if not self.causal:
                return
            for pieces in ([10, *[1] * 14], [1] * LENGTH, [7, 9, 8]):
                cache, found = exported.new_cache(), []
                for part in tokens.split(pieces, dim=1):
                    found.append(exported(part, **{CACHE: cache}).logits)
                torch.testing.assert_close(torch.cat(found, dim=1), wanted, rtol=0, atol=1e-4)


def losses_and_gradients(model: MosaGPTModel, batch: dict) -> dict[str, Tensor]:
    loss, _ = language_model_loss(model, **batch)
    (loss / 3).backward()
    found = {name: cast(Tensor, parameter.grad) for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def written_out(heads: Any, groups: int, states: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
    """Return what each head attends to, [B, T, H, h'], for weights in Megatron's layout: head by head."""
    size = heads.config.head_dim
    rows = heads.qkv_weight.view(groups, -1, size, states.shape[-1])  # [G, H / G + 2, h', h]
    outputs = []
    for group in rows:
        key, value = (states @ matrix.T for matrix in group[-2:])  # [B, T, h']
        key = naive.apply_rotary(key, positions, 0.5, 10000.0)
        for matrix in group[:-2]:
            query = naive.apply_rotary(states @ matrix.T, positions, 0.5, 10000.0)
            outputs.append(masked_attention(query[:, None], key[:, None], value[:, None], visible)[:, 0])
    return torch.stack(outputs, dim=2)


def gated(heads: Any, attended: Tensor, states: Tensor) -> Tensor:
    """Multiply [B, T, H, h'] by one number a head and token."""
    rows = []
    for head, weight in enumerate(heads.gate_weight):
        rows.append(attended[:, :, head] / (1 + torch.exp(-(states @ weight)))[:, :, None])
    return torch.stack(rows, dim=2)


class TestFixed(HeadKindTests):
    option = "fixed"

    def truth(self, heads: Any, states: Tensor, visible: Tensor, lengths: list[list[int]]) -> Tensor:
        positions = torch.arange(LENGTH)
        is_seen = positions % 3 == 0
        attended = written_out(heads, 4, states, positions, (visible & is_seen) | torch.eye(LENGTH, dtype=torch.bool))
        return (attended * is_seen[:, None, None]).flatten(2) @ heads.proj_weight.T

    def test_only_multiples_of_the_stride_matter(self, layout: Layout) -> None:
        layer = MosaSelfAttention(transformer_config(self.config))
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        states = torch.randn(LENGTH, 1, 24)
        changed = states.clone()
        changed[10] += 1  # no multiple of 3
        assert torch.equal(layer(states)[0], layer(changed)[0])
        output = layer(states)[0].norm(dim=-1)[:, 0]
        assert (output > 0).tolist() == [token % 3 == 0 for token in range(LENGTH)]

    def test_stride_follows_the_sparsity(self) -> None:
        tiny = tiny_config(model__num_fixed_heads=4, mosa__sparsity=4.5)
        assert (tiny.fixed_stride, transformer_config(tiny).mosa_fixed_stride) == (4, 4)
        assert tiny_config(model__num_fixed_heads=4, model__fixed_stride=7).fixed_stride == 7

    def test_cost_of_a_step(self) -> None:
        """Of 8 tokens: 8 h h' and 4 h' per causal pair, three times; within documents by their share."""
        documents = [[9, 6, 9]]
        within = replace(self.config, model=replace(self.config.model, attend_within_documents=True))
        bare = replace(within, model=replace(within.model, num_fixed_heads=0, fixed_stride=None))
        for config, lengths, pairs in ((self.config, (), 36), (within, documents, 6 + 3 + 6)):
            found = model_flops(config, VOCAB_SIZE, lengths) - model_flops(bare, VOCAB_SIZE, lengths)
            assert found == 3 * 2 * 4 * (8 * 24 * 8 * 8 + 4 * 8 * pairs)


class TestRouting(HeadKindTests):
    option = "routing"  # 4 clusters of 6 tokens
    causal = False  # whether a cluster takes a token depends on all tokens

    def truth(self, heads: Any, states: Tensor, visible: Tensor, lengths: list[list[int]]) -> Tensor:
        positions, own = torch.arange(LENGTH), torch.eye(LENGTH, dtype=torch.bool)
        outputs = []
        for rows, centroids in zip(heads.qv_weight.view(4, 2, 8, -1), heads.centroids.double(), strict=True):
            query, value = (states @ matrix.T for matrix in rows)  # [B, T, h']
            query = query / query.square().sum(-1, keepdim=True).sqrt()
            rotated = naive.apply_rotary(query * 8**0.5, positions, 0.5, 10000.0)
            total, number = torch.zeros_like(value), torch.zeros_like(value[..., :1])
            for centroid in centroids:
                distances = (query - centroid).square().sum(-1).tolist()  # [B, T]
                taken = torch.zeros(len(states), LENGTH, dtype=torch.bool)
                for sequence, row in enumerate(distances):
                    taken[sequence, sorted(range(LENGTH), key=lambda token: row[token])[:6]] = True
                seen = visible & taken[:, None] | own
                attended = masked_attention(rotated[:, None], rotated[:, None], value[:, None], seen)[:, 0]
                total, number = total + attended * taken[..., None], number + taken[..., None]
            outputs.append(total / number.clamp(min=1))
        return torch.stack(outputs, dim=2).flatten(2) @ heads.proj_weight.T

    def uncounted_flops(self, config: Config) -> int:
        """The paper counts the products with one centroid; torch's counter all 4, and in training sums of h' + 1."""
        return -4 * (2 * 8 * LENGTH * 3 + 2 * 9 * LENGTH * 4)

    def test_cost_of_a_step(self) -> None:
        """Of 24 tokens: 6 h h', 2 h' per centroid without a gradient, and 4 h' per causal pair in 4 clusters of 6."""
        documents = [[8, 16]]
        within = replace(self.config, model=replace(self.config.model, attend_within_documents=True))
        bare = replace(within, model=replace(within.model, num_routing_heads=0, routing_clusters=None))
        for config, lengths, pairs in ((self.config, (), 21), (within, documents, 3 + 10)):
            found = model_flops(config, VOCAB_SIZE, lengths) - model_flops(bare, VOCAB_SIZE, lengths)
            assert found == 2 * 4 * (3 * (6 * 24 * 8 * LENGTH + 4 * 8 * 4 * pairs) + 2 * 8 * LENGTH * 4)

    def test_flops_are_those_of_the_paper(self) -> None:
        config = replace(self.config, data=replace(self.config.data, sequence_length=1024))
        head = 6 * 24 * 8 * 1024 + 4 * 8 * 256**2 * 4 + 2 * 8 * 1024
        assert paper_flops(config) == 2 * (4 * head + 16 * 24**2 * 1024)

    def test_clusters_follow_the_sparsity(self) -> None:
        tiny = tiny_config(model__num_routing_heads=4, mosa__sparsity=4.5)
        assert (tiny.routing_clusters, transformer_config(tiny).mosa_routing_clusters) == (4, 4)
        assert tiny_config(model__num_routing_heads=4, model__routing_clusters=7).routing_clusters == 7

    def test_centroids_begin_as_unit_vectors_drawn_from_the_seed(self, layout: Layout) -> None:
        first, again, other = (
            selection_buffers(build_model(replace(self.config, run=replace(self.config.run, seed=seed)), VOCAB_SIZE))
            for seed in (5, 5, 6)
        )
        assert len(first) == self.config.model.num_layers
        for name, centroids in first.items():
            assert centroids.dtype == torch.float32 and centroids.shape == (4, 4, 8)
            torch.testing.assert_close(centroids.norm(dim=-1), torch.ones(4, 4))
            assert torch.equal(centroids, again[name]) and not torch.equal(centroids, other[name])
        layers = list(first.values())
        assert not torch.equal(layers[0], layers[1])

    def test_centroids_move_to_the_mean_of_their_tokens(self, layout: Layout) -> None:
        config = replace(self.config, model=replace(self.config.model, routing_decay=0.75))
        heads = MosaSelfAttention(transformer_config(config)).routing_heads
        assert heads is not None
        torch.nn.init.normal_(heads.qv_weight)
        torch.nn.init.normal_(heads.proj_weight)
        set_centroids(heads)
        heads.centroids[0, 1] = -heads.centroids[0, 0]
        before, model = heads.centroids.clone(), torch.nn.ModuleList([heads])
        tokens: list[list[list[Tensor]]] = [[[] for _ in range(4)] for _ in range(4)]
        for _ in range(2):  # micro-batches
            states = torch.randn(LENGTH, 3, 24)
            heads(states)
            for head, matrix in enumerate(heads.qv_weight.detach().view(4, 2, 8, 24)[:, 0]):
                for row in (states @ matrix.T).flatten(0, 1):
                    direction = row / row.norm()
                    distances = (before[head] - direction).norm(dim=-1)
                    tokens[head][int(distances.argmin())].append(direction)
        update_thresholds(model, None)
        for head, clusters in enumerate(tokens):
            for cluster, members in enumerate(clusters):
                moved = 0.75 * before[head, cluster] + 0.25 * torch.stack(members).mean(0)
                torch.testing.assert_close(heads.centroids[head, cluster], moved / moved.norm())
        assert not heads.cluster_sums.any()

    def test_a_centroid_without_tokens_stays(self, layout: Layout) -> None:
        heads = MosaSelfAttention(transformer_config(self.config)).routing_heads
        assert heads is not None
        set_centroids(heads)
        heads.centroids[:, 3] = heads.centroids[:, 2]  # ties go to the earlier centroid
        before = heads.centroids.clone()
        torch.nn.init.normal_(heads.qv_weight)
        torch.nn.init.normal_(heads.proj_weight)
        heads(torch.randn(LENGTH, 2, 24))
        assert (heads.cluster_sums[..., -1].sum(-1) == 2 * LENGTH).all()
        update_thresholds(torch.nn.ModuleList([heads]), None)
        still = (heads.centroids == before).all(-1)
        assert still[:, 3].all() and not still[:, :3].all()

    def test_only_first_passes_in_training_count(self, layout: Layout) -> None:
        for recompute in ("none", "attention", "full"):
            config = replace(self.config, train=replace(self.config.train, recompute=recompute))
            model = build_model(config, VOCAB_SIZE)
            batch = {name: tensor[-2:] for name, tensor in global_batch(config, 0).items()}
            language_model_loss(model.eval(), **batch)
            assert not any(heads.cluster_sums.any() for heads in routing_layers(model))
            losses_and_gradients(model.train(), batch)
            plain = [heads.cluster_sums.clone() for heads in routing_layers(model)]
            assert all((sums[..., -1].sum(-1) == 2 * LENGTH).all() for sums in plain)
            forget_scores(model)
            fused_loss = get_backend("triton", torch.empty(0)).linear_cross_entropy  # interpreted
            model.compile_layers(naive, fused_loss, backend=None)
            losses_and_gradients(model, batch)
            for heads, sums in zip(routing_layers(model), plain, strict=True):
                torch.testing.assert_close(heads.cluster_sums, sums)
            forget_scores(model)
            assert not any(heads.cluster_sums.any() for heads in routing_layers(model))

    def test_the_shortest_sequences(self, layout: Layout) -> None:
        layer = MosaSelfAttention(transformer_config(self.config))
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        set_centroids(layer)
        for length in (1, 2, 3, 7):
            assert layer(torch.randn(length, 2, 24))[0].isfinite().all()
        states = torch.randn(1, 2, 24)
        value = states @ layer.routing_heads.qv_weight.view(4, 2, 8, 24)[:, 1].flatten(0, 1).T
        torch.testing.assert_close(layer(states)[0], value @ layer.routing_heads.proj_weight.T)

    def test_state_stays_in_fp32(self, layout: Layout) -> None:
        model = build_model(self.config, VOCAB_SIZE).to(torch.bfloat16)
        for heads in routing_layers(model):
            assert heads.qv_weight.dtype == torch.bfloat16
            assert heads.centroids.dtype == heads.cluster_sums.dtype == torch.float32


class TestGatedDense(HeadKindTests):
    option = "gated"

    def truth(self, heads: Any, states: Tensor, visible: Tensor, lengths: list[list[int]]) -> Tensor:
        attended = written_out(heads, 2, states, torch.arange(LENGTH), visible)
        return gated(heads, attended, states).flatten(2) @ heads.proj_weight.T

    def uncounted_flops(self, config: Config) -> int:
        return 4 * 8 * LENGTH  # h' T a head: elementwise

    def test_cost_of_a_step(self) -> None:
        plain = tiny_config(**OPTIONS["gated"] | {"model__attention_gate": False})
        assert model_flops(self.config, VOCAB_SIZE) - model_flops(plain, VOCAB_SIZE) == 2 * 3 * 4 * 2 * 24 * LENGTH
        assert parameter_count(self.config, VOCAB_SIZE) - parameter_count(plain, VOCAB_SIZE) == 2 * 4 * 24


class TestGatedLocal(HeadKindTests):
    option = "gated_local"

    def truth(self, heads: Any, states: Tensor, visible: Tensor, lengths: list[list[int]]) -> Tensor:
        attended = written_out(heads, 4, states, torch.arange(LENGTH), visible.triu(-4))
        return gated(heads, attended, states).flatten(2) @ heads.proj_weight.T

    def test_flops_of_the_paper_are_the_counted_ones(self, layout: Layout) -> None:
        """Local heads run in blocks, so this one is by hand: 8 h h' T + 4 h' T w + 2 h T + h' T a head."""
        width, size, window = 24, 8, 5
        head = (8 * width * size + 4 * size * window + 2 * width + size) * LENGTH
        assert paper_flops(self.config) == 2 * (4 * head + 16 * width**2 * LENGTH)


class TestMosaByExpertChoice(HeadKindTests):
    option = "mosa"
    causal = False  # whether a token is selected depends on all scores

    def truth(self, heads: Any, states: Tensor, visible: Tensor, lengths: list[list[int]]) -> Tensor:
        return mosa_reference(
            states, heads.router_weight, heads.qkv_weight, heads.proj_weight, num_selected=6, include_first_token=True,
            rotary_percent=0.5, rotary_base=10000.0, lengths=lengths,
        )  # fmt: skip

    def uncounted_flops(self, config: Config) -> int:
        return 8 * 8 * 6  # h' k a head: elementwise


@pytest.mark.parametrize("selection", ["expert_choice", "threshold", "token_choice"])
def test_conversions_know_the_state_of_each_selection(layout: Layout, selection: str) -> None:
    config = tiny_config(mosa__selection=selection)
    weights = {weight.name: weight.shape for weight in model_weights(config, 64)}
    stored = stored_tensors(build_model(config, VOCAB_SIZE))
    assert weights == {name: tuple(tensor.shape) for name, (tensor, _, _) in stored.items()}


class TestMosaByTokenChoice(HeadKindTests):
    option = "token_choice"  # each token takes 2 of 8 heads

    def truth(self, heads: Any, states: Tensor, visible: Tensor, lengths: list[list[int]]) -> Tensor:
        scores = torch.sigmoid(states @ heads.router_weight.T)  # [B, T, E]
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        for sequence, rows in enumerate(scores.tolist()):
            for token, row in enumerate(rows):
                for head in sorted(range(8), key=lambda head: -row[head])[:2]:
                    chosen[sequence, token, head] = True
            first = 0
            for length in lengths[sequence]:
                chosen[sequence, first] = True
                first += length
        output = torch.zeros_like(states)
        positions, own = torch.arange(LENGTH), torch.eye(LENGTH, dtype=torch.bool)
        for head in range(8):
            query, key, value = (states @ heads.qkv_weight[head]).chunk(3, dim=-1)
            query, key = (naive.apply_rotary(part, positions, 0.5, 10000.0) for part in (query, key))
            seen = visible & chosen[:, None, :, head] | own
            attended = masked_attention(query[:, None], key[:, None], value[:, None], seen)[:, 0]
            gate = (scores[:, :, head] * chosen[:, :, head]).unsqueeze(-1)
            output = output + (gate * attended) @ heads.proj_weight[head]
        return output

    def uncounted_flops(self, config: Config) -> int:
        return 8 * 8 * 6  # h' k a head: elementwise

    def counted_config(self) -> Config:
        """With as many slots as a head of equal load needs: the formula assumes equal loads."""
        return replace(self.config, mosa=replace(self.config.mosa, capacity_factor=1.0))

    def test_ties_go_to_the_earlier_head(self) -> None:
        scores = torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.9]]).unsqueeze(-1)  # [1, E, 1]
        for number, wanted in ((1, [1]), (2, [1, 4]), (3, [0, 1, 4]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4])):
            assert choose_heads(scores, torch.zeros(5), number)[0, :, 0].nonzero().flatten().tolist() == wanted
        bias = torch.tensor([0.0, 0.0, 0.3, 0.5, 0.0])
        assert choose_heads(scores, bias, 2)[0, :, 0].nonzero().flatten().tolist() == [1, 3]  # ties again

    def test_statistics_are_of_the_choices(self, layout: Layout) -> None:
        config = replace(self.config, mosa=replace(self.config.mosa, capacity_factor=1.0))
        model, tokens = random_model(config).train(), random_tokens(1)
        with recorded_selection(model):
            logits_of(model, tokens)
        taken = [heads.choices[:-1].tolist() for heads in mosa_layers(model)]
        firsts = [  # token 0 goes to all heads, and counts only where it chose them
            choose_heads(cast(Any, heads.selection)[0], heads.head_bias, 2)[0, :, 0] for heads in mosa_layers(model)
        ]
        update_thresholds(model, None)
        found = selection_statistics(model)
        for layer, (counts, first) in enumerate(zip(taken, firsts, strict=True)):
            wanted = [count + (not chose) for count, chose in zip(counts, first.tolist(), strict=True)]
            dropped = [max(0, count - 6) for count in wanted]
            assert found["load_of_heads"][layer] == pytest.approx([count / 6 for count in counts])
            assert found["overflow_share"][layer] == pytest.approx(sum(dropped) / sum(wanted)) and sum(dropped) > 0
        assert "unselected_share" in found

    def test_biases_make_loads_alike_and_leave_the_gate(self, layout: Layout) -> None:
        config = replace(self.config, mosa=replace(self.config.mosa, balance_rate=0.02))
        model, tokens = random_model(config).train(), random_tokens(8)
        loads = []
        for step in range(150):
            if step == 1:
                for heads in mosa_layers(model):  # a head with just its share keeps its bias
                    moved = torch.sign(1 - cast(Tensor, heads.load))
                    torch.testing.assert_close(heads.head_bias, 0.02 * moved)
            logits_of(model, tokens)
            for heads in mosa_layers(model):
                assert heads.choices[-1] == tokens.numel() and heads.choices[:-1].sum() == 2 * tokens.numel()
            update_thresholds(model, None)
            loads.append(torch.stack([cast(Tensor, heads.load) for heads in mosa_layers(model)]))
        assert loads[0].max() > 1.5 and loads[0].min() < 0.5
        last = torch.stack(loads[-20:]).mean(0)  # biases swing around their best values
        assert last.max() < 1.35 and last.min() > 0.65
        heads = mosa_layers(model)[0]
        assert not heads.choices.any()
        states = torch.randn(LENGTH, 1, 24)
        _, scores, _ = heads.attend(states, None, naive, False, False)
        torch.testing.assert_close(scores[0, :, :], torch.sigmoid(states[:, 0] @ heads.router_weight.T).T)
        logits_of(model, tokens)
        forget_scores(model)
        assert not heads.choices.any()
