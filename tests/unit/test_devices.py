"""What only runs on GPUs mixes no tensors of different devices: run with tensors that only pretend to be on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.interpreter import InterpretedFunction

from megatron_mosa.attention import functional, mosa_attention, update_thresholds
from megatron_mosa.checkpoint.host_memory import HostMemory
from megatron_mosa.engine import DeepSpeedEngine
from megatron_mosa.engine.acceleration import Acceleration
from megatron_mosa.hf import dense_mosa, graph_mosa, kernels_mosa
from megatron_mosa.hf.modeling_mosa import CACHE
from megatron_mosa.kernels import Documents, naive
from megatron_mosa.metrics import recorded_selection, selection_statistics
from megatron_mosa.model import build_model
from megatron_mosa.parallel import Layout
from megatron_mosa.tools.decoding import bench, speed
from megatron_mosa.tools.evaluation.model import EvaluationModel
from tests.decode.models import build, random_tokens
from tests.distributed.tasks import VOCAB_SIZE, global_batch, tiny_config
from tests.head_kinds import OPTIONS
from tests.pretended_gpu import GPU, move, pretended_gpu

ABOVE = {"mosa__selection": "threshold", "mosa__threshold_warmup_steps": 1, "mosa__load_feedback": 0.5}
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.fixture(autouse=True)
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOSA_BACKEND", "naive")


def plain_loss(states: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, _: object) -> Tensor:
    return (F.cross_entropy(states @ weight.t(), targets, reduction="none") * token_weights).sum()


def check_arguments(*arguments: object, **_: object) -> None:
    """What a kernel's launch comes to here: it computes nothing, which would take long."""
    assert all(argument.is_cuda for argument in arguments if isinstance(argument, Tensor))


def test_what_a_gpu_refuses_is_refused() -> None:
    with pretended_gpu():
        here, there = torch.ones(3), torch.arange(3, device="cuda")
        refused: list[Callable[[], object]] = [
            lambda: here + there, lambda: here[there], lambda: torch.where(there > 1, here, 0.0),
            lambda: torch.empty(3, device="cuda", pin_memory=True),
        ]  # fmt: skip
        for function in refused:
            with pytest.raises(AssertionError):
                function()
        assert there[torch.tensor([1, 2])].tolist() == [1, 2] and (there + torch.tensor(1)).cpu().sum() == 6


@pytest.mark.parametrize("kind", ["mosa", "above", "token_choice", "fixed", "gated_local", "routing", "fixed_hybrid"])
@pytest.mark.parametrize("within_documents", [False, True])
def test_training_and_evaluation(kind: str, within_documents: bool, layout: Layout) -> None:
    options = (OPTIONS | {"above": ABOVE})[kind] | {"model__attend_within_documents": within_documents}
    config = tiny_config(**options)
    model: Any = build_model(config, VOCAB_SIZE)
    model.compile_layers(naive, plain_loss, backend=None)
    engine: Any = object.__new__(DeepSpeedEngine)
    engine.layout, engine.acceleration, engine._graphed = replace(layout, device=GPU), Acceleration(True), None
    engine._engine, model.__dict__["module"] = model, model
    batch = global_batch(config, 0)
    viewless = mock.patch("megatron.core.utils._kernel_make_viewless_tensor", lambda tensor, _: tensor)
    with pretended_gpu(), viewless, recorded_selection(model):
        move(model)
        for step in range(2):
            in_graph = {name: tensor.to(GPU) for name, tensor in engine._in_fixed_shapes(batch).items()}
            loss = engine._loss(model, batch)[0] if step else engine._loss_in_graph(in_graph)
            engine._record_selection(batch)
            update_thresholds(model, None)
        assert loss.is_cuda and engine._counted_tokens([batch]).item() == batch["loss_mask"].sum()
        statistics = selection_statistics(model)
        assert len(statistics["unselected_share"]) == (2 if config.mosa.num_heads else 0)
        validation = engine.evaluate([batch])
        losses = EvaluationModel(model.eval(), GPU).losses(
            batch["tokens"], batch["labels"], batch.get("document_starts")
        )
    assert not losses.is_cuda
    assert validation == pytest.approx(4.1, abs=0.2)


@pytest.mark.parametrize("kind", ["hybrid", "all", "chosen", "followed", "captured"])
@torch.no_grad()
def test_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captures = kind == "captured"
    monkeypatch.setattr(kernels_mosa, "supports_kernels", lambda device: captures)
    monkeypatch.setattr(graph_mosa.CapturedSteps, "_run", lambda self, cache, key: self._step(cache))
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda *_: check_arguments)
    monkeypatch.setattr(
        dense_mosa, "causal_lower_right", lambda q, k: torch.ones(q, k, dtype=torch.bool, device=GPU).tril(k - q)
    )  # torch's is another subclass of Tensor
    model, tokens = build("hybrid" if captures else kind, num_hidden_layers=2), random_tokens(2, 24)
    for is_default in (False, True):
        with pretended_gpu(), torch.device("cuda") if is_default else nullcontext():
            if not is_default:
                move(model)
            ids, cache = tokens.to(GPU), model.new_cache()
            for start, end in ((0, 14), *((n, n + 1) for n in range(14, 20)), (20, 24)):
                if end < 24 or not captures:
                    logits = model(ids[:, start:end], **{CACHE: cache}).logits
            assert logits.is_cuda
            cache.batch_repeat_interleave(2)
            if not captures:
                mask = torch.ones_like(ids).index_fill_(1, torch.zeros(1, dtype=torch.long, device=GPU), 0)
                model.generate(ids, attention_mask=mask, max_new_tokens=2, num_beams=2, do_sample=False)


def test_host_memory_is_on_the_host_whatever_the_default_device() -> None:
    starts = torch.tensor([[0, 0, 2]])
    with torch.device("meta"):
        assert HostMemory().copy("name", torch.ones(3, device="cpu")).tolist() == [1, 1, 1]
        assert Documents.from_starts(starts).lengths == ((2, 1),)


def test_a_device_that_is_not_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    with mock.patch.object(torch.cuda, "synchronize") as synchronize:
        speed._now(device)
    synchronize.assert_called_once_with(device)
    functions: dict[str, Any] = dict(find_device=lambda _: device, load_model=lambda *_, **__: (None, None))
    functions |= dict(check_thresholds=mock.Mock())
    with mock.patch.multiple(bench, **functions), mock.patch.object(torch.cuda, "get_device_name") as name:
        bench.bench(mock.Mock(batches=(), context=1), None)
    name.assert_called_once_with(device)
    states, current = torch.zeros(1, 4, 8), []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: current.append(tensor) or nullcontext())
    monkeypatch.setattr(functional, "get_backend", lambda *_: naive)
    mosa_attention(states, torch.ones(2, 8), torch.ones(2, 8, 12), torch.ones(2, 4, 8), num_selected=2)
    assert current and current[0] is states
