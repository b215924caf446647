"""Measures of a model against independent computations, with models that look ahead and models that do not."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from megatron_mosa.attention.mosa_heads import MosaHeads
from megatron_mosa.attention.thresholds import mosa_layers
from megatron_mosa.config import Config
from megatron_mosa.convert.logits import single_process_groups
from megatron_mosa.convert.model_config import model_config
from megatron_mosa.convert.weights import model_weights
from megatron_mosa.data import ValidationSamples
from megatron_mosa.errors import UserError
from megatron_mosa.metrics.selection import recorded_selection
from megatron_mosa.model import build_model, transformer_config
from megatron_mosa.model.calibration import calibrate, calibration_config
from megatron_mosa.tools.evaluation import evaluate as measures
from megatron_mosa.tools.evaluation.command import _device, _multiples, _write, evaluate
from megatron_mosa.tools.evaluation.flips import flip_rates
from megatron_mosa.tools.evaluation.losses import (
    chosen_positions,
    estimate,
    position_ranges,
    prefix_losses,
    token_losses,
)
from megatron_mosa.tools.evaluation.model import EvaluationModel
from megatron_mosa.tools.evaluation.report import print_report

LENGTH, VOCABULARY, SPARSITY = 24, 64, 4.0


class Windows(ValidationSamples):
    """Random text in the form of ``ValidationSamples``."""

    def __init__(self, count: int) -> None:
        self.sequence_length = LENGTH
        self.tokens = torch.randint(VOCABULARY, (count, LENGTH + 1), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.tokens[index]
        return {"tokens": window[:-1], "labels": window[1:], "loss_mask": torch.ones(LENGTH)}


def config(selection: str) -> Config:
    model = {"num_layers": 2, "hidden_size": 16, "head_dim": 8, "num_dense_heads": 1, "vocab_size_multiple": 1}
    mosa = {"num_heads": 3, "sparsity": SPARSITY}
    made = model_config({"model": model, "mosa": mosa, "data": {"sequence_length": LENGTH}})
    return calibration_config(made) if selection == "threshold" else made


@pytest.fixture(params=["expert_choice", "threshold"])
def model(request: pytest.FixtureRequest) -> Iterator[EvaluationModel]:
    with built(request.param) as found:
        yield found


@contextmanager
def built(selection: str, calibrated: bool = True) -> Iterator[EvaluationModel]:
    """Build a model with random weights; thresholds are calibrated on other text, or not at all."""
    with single_process_groups(config(selection)):
        module = build_model(config(selection), VOCABULARY).eval()
        with torch.no_grad():
            for layer in mosa_layers(module):
                layer.router_weight.mul_(8)  # so that heads make different selections
                layer.proj_weight.mul_(8)  # so that selections affect later layers
        model = EvaluationModel(module, torch.device("cpu"))
        if selection == "threshold" and calibrated:
            calibrate(module, lambda: model.forward(Windows(40).tokens[20:, :-1]))
        yield model


def selected(layer: MosaHeads) -> tuple[Tensor, Tensor]:
    """Return scores [B, E, T] and indices [B, E, k] of the last recorded forward pass."""
    assert layer.selection is not None
    return layer.selection


def ignore(tokens: int) -> None:
    assert tokens > 0


def is_causal(model: EvaluationModel) -> bool:
    return mosa_layers(model.module)[0].selects_above(training=False)


def losses_of(model: EvaluationModel, tokens: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model.module(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def test_token_losses_and_prefix_losses(model: EvaluationModel) -> None:
    windows = Windows(5)
    tokens, labels = windows.tokens[:, :-1], windows.tokens[:, 1:]
    found = token_losses(model, windows, 2 * LENGTH, ignore)
    torch.testing.assert_close(found, losses_of(model, tokens, labels))
    positions = [0, 5, LENGTH - 1]
    prefixes = prefix_losses(model, windows, positions, 2 * LENGTH, ignore)
    expected = [losses_of(model, tokens[:, : end + 1], labels[:, : end + 1])[:, end] for end in positions]
    torch.testing.assert_close(prefixes, torch.stack(expected, dim=1))
    leak = (prefixes - found[:, positions]).abs()
    assert leak[:, -1].max() < 1e-5  # the prefix is the whole sequence
    assert (leak.max() < 1e-5) == is_causal(model)


def test_flip_rates_count_selections_that_depend_on_the_future(model: EvaluationModel) -> None:
    windows = Windows(4)
    positions = [0, 7, 15]
    rates = flip_rates(model, windows, positions, 4 * LENGTH, ignore)
    tokens = windows.tokens[:, :-1]
    expected = []
    for position in positions:
        sets = []
        for text in (tokens, torch.cat((tokens[:, : position + 1], tokens.roll(1, 0)[:, position + 1 :]), dim=1)):
            with recorded_selection(model.module):
                model.forward(text)
            sets.append(
                {
                    (number, *where, token)
                    for number, layer in enumerate(mosa_layers(model.module))
                    for where in np.ndindex(4, 3)
                    for token in selected(layer)[1][where].tolist()
                    if token <= position
                }
            )
        expected.append(len(sets[0] ^ sets[1]) / (len(sets[0]) + len(sets[1])))
    assert rates.tolist() == pytest.approx(expected)
    assert (rates.max() == 0) == is_causal(model)


def test_calibrated_thresholds_select_the_intended_share() -> None:
    assert transformer_config(config("threshold")).capacity(LENGTH) == LENGTH  # the capacity drops no tokens
    with built("threshold") as model, recorded_selection(model.module):
        model.forward(Windows(40).tokens[20:, :-1])
        for layer in mosa_layers(model.module):
            scores = selected(layer)[0].transpose(0, 1).flatten(1).numpy()  # [E, B * T]
            thresholds = np.quantile(scores, 1 - 1 / SPARSITY, axis=1)
            np.testing.assert_allclose(layer.thresholds.numpy(), thresholds, atol=0.02)
            shares = (scores > layer.thresholds.numpy()[:, None]).mean(axis=1)
            np.testing.assert_allclose(shares, 1 / SPARSITY, atol=0.02)


class Texts(Windows):
    """Different text for each split: the training split uses only part of the vocabulary."""

    def __init__(
        self, mixture: object, *, sequence_length: int, num_samples: int, mark_documents: bool, split: str
    ) -> None:
        assert sequence_length == LENGTH and not mark_documents
        super().__init__(num_samples)
        if split == "train":
            self.tokens = self.tokens[:10].roll(1) % 9  # it is short, too


def test_thresholds_are_calibrated_on_the_training_split_and_measured_on_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def texts(split: str, count: int) -> Texts:
        return Texts(None, sequence_length=LENGTH, num_samples=count, mark_documents=False, split=split)

    monkeypatch.setattr(measures, "ValidationSamples", Texts)
    monkeypatch.setattr(
        measures,
        "evaluation_model",
        lambda model, device, dtype, calibrates: built(
            "threshold" if calibrates else "expert_choice", calibrated=False
        ),
    )
    settings = measures.Settings(
        num_samples=6, prefixes=0, lengths=(), calibration_samples=20, tokens_at_once=2 * LENGTH,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    opened: Any = SimpleNamespace(config=config("expert_choice"))
    announced: list[int] = []
    ticks: list[int] = []
    found = measures.evaluate(opened, cast(Any, None), settings, ticks.append, announced.append)
    assert announced == [sum(ticks)]
    assert found["calibration_samples"] == 10 and found["settings"]["calibration_samples"] == 20
    windows = texts("validation", 6).tokens
    with built("expert_choice") as model:
        expected = losses_of(model, windows[:, :-1], windows[:, 1:])
    assert found["full_sequence"]["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    causal = {}
    for split in ("train", "validation"):
        with built("threshold", calibrated=False) as model:
            calibrate(model.module, lambda: model.forward(texts(split, 10).tokens[:, :-1]))  # noqa: B023
            causal[split] = losses_of(model, windows[:, :-1], windows[:, 1:]).mean().item()
    assert found["causal"]["loss"] == pytest.approx(causal["train"], rel=1e-5)
    assert abs(causal["train"] - causal["validation"]) > 1e-3
    assert found["causal"]["label"] == "causal, by thresholds, calibrated on 10 windows of the training split"


def test_thresholds_that_were_never_set_look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    unset = config("threshold")
    monkeypatch.setattr(measures, "ValidationSamples", Texts)
    monkeypatch.setattr(measures, "evaluation_model", lambda *_, calibrates: built("threshold", calibrated=False))
    settings = measures.Settings(
        num_samples=6, prefixes=0, lengths=(), calibration_samples=10, tokens_at_once=2 * LENGTH,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    opened: Any = SimpleNamespace(config=unset, weights=model_weights(unset, VOCABULARY), read=lambda _: torch.zeros(3))
    found = measures.evaluate(opened, cast(Any, None), settings, ignore)
    assert found["full_sequence"]["label"].startswith("NON-CAUSAL") and found["flip_rate"] > 0
    assert found["causal"]["label"] == "causal, by thresholds, calibrated on 10 windows of the training split"
    assert found["causal"]["loss"] != found["full_sequence"]["loss"]


def test_routing_heads_have_no_causal_counterpart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = config("expert_choice")
    routing = replace(both, model=replace(both.model, num_routing_heads=2, routing_clusters=4))

    @contextmanager
    def as_trained(_: object, __: object, ___: object, calibrates: bool) -> Iterator[EvaluationModel]:
        assert not calibrates
        with single_process_groups(routing):
            yield EvaluationModel(build_model(routing, VOCABULARY).eval(), torch.device("cpu"))

    monkeypatch.setattr(measures, "ValidationSamples", Texts)
    monkeypatch.setattr(measures, "evaluation_model", as_trained)
    settings = measures.Settings(
        num_samples=6, prefixes=1, lengths=(), calibration_samples=10, tokens_at_once=2 * LENGTH,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    opened: Any = SimpleNamespace(config=routing)
    found = measures.evaluate(opened, cast(Any, None), settings, ignore)
    assert found["causal"] is None and all(row["causal"] is None for row in found["by_position"])
    parts = [(row["last"] - row["first"] + 1, row["leak"]) for row in found["by_position"]]
    assert found["leak"]["mean"] == pytest.approx(sum(size * leak for size, leak in parts) / LENGTH)
    assert found["leak"]["error"] > 0 and found["by_position"][-2]["last"] == 15
    windows = Texts(None, sequence_length=LENGTH, num_samples=6, mark_documents=False, split="validation")
    with as_trained(None, None, None, calibrates=False) as model:
        half, sixteen = flip_rates(model, windows, [LENGTH // 2 - 1, 15], 2 * LENGTH, ignore).tolist()
    assert found["by_position"][-2]["flip_rate"] == sixteen and found["flip_rate"] == half > 0
    assert half != sixteen
    assert found["full_sequence"]["label"].startswith("NON-CAUSAL: heads select tokens with the whole sequence")
    summary = {"length": 8, "full_sequence": found["full_sequence"], "causal": None}
    print_report(found | {"by_length": [summary], "left_out": {}}, Console(width=200))
    output = capsys.readouterr().out
    assert "full sequence (NON-CAUSAL" in output and "causal (" not in output


def test_ranges_and_positions() -> None:
    assert position_ranges(6) == [range(1), range(1, 2), range(2, 4), range(4, 6)]
    assert position_ranges(1) == [range(1)]
    assert chosen_positions(position_ranges(16), 2) == [0, 1, 2, 3, 5, 7, 11, 15]
    assert chosen_positions(position_ranges(6), 1) == [0, 1, 3, 5]
    assert estimate(torch.tensor([1.0, 3.0])) == (2.0, pytest.approx(1.0))


def test_what_is_not_defined_is_null_in_the_file_and_a_dash_in_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undefined = {"loss": math.nan, "error": math.nan, "tokens": 4, "label": "causal"}
    row = {"first": 0, "last": 0, "full_sequence": math.nan, "causal": math.nan, "flip_rate": math.nan}
    found: dict[str, Any] = {"samples": 2, "sequence_length": 4, "full_sequence": undefined, "causal": undefined}
    found |= {"by_position": [row], "leak": {"mean": math.inf, "error": math.nan}, "flip_rate": math.nan}
    found |= {"by_length": [{"length": 8, "full_sequence": undefined, "causal": undefined}], "left_out": {}}
    print_report(found, Console(width=200))
    _write(found, tmp_path / "found.json")
    assert re.search(r"\b(nan|inf)\b", capsys.readouterr().out) is None
    written = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert written["leak"] == {"mean": None, "error": None} and written["by_position"][0]["flip_rate"] is None


def test_the_report_shows_all_measures(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"loss": 2.0, "error": 0.1, "tokens": 10, "label": "NON-CAUSAL"}
    rows = [{"first": 0, "last": 0, "full_sequence": 1.0, "causal": 1.5, "flip_rate": None}]
    rows.append(rows[0] | {"last": 3, "prefix_only": 3.25, "leak": 0.5, "leak_error": 0.25, "flip_rate": 0.125})
    lengths = [{"length": 8, "full_sequence": summary, "causal": summary | {"loss": 2.5}}]
    found = {"samples": 2, "sequence_length": 4, "full_sequence": summary, "causal": summary, "by_position": rows}
    found |= {"leak": {"mean": 0.375, "error": 0.125}, "flip_rate": 0.125}
    print_report(found | {"by_length": lengths, "left_out": {16: "too little text"}}, Console(width=200))
    output = capsys.readouterr().out
    for text in (
        "NON-CAUSAL",
        "7.39",
        "0-3",
        "3.2500",
        "0.5000",
        "12.50%",
        "2.5000",
        "the leak is 0.3750 (error 0.1250)",
        "skipped length 16: too little text",
    ):
        assert text in output


@pytest.mark.parametrize("text", ["1", "2,x", "-2"])
def test_invalid_lengths_are_refused(text: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"--lengths must be comma-separated integers of at least 2 and below 10000, such as 2,4, got {text}",
    ):
        _multiples(text)
    assert _multiples("2, 4") == (2, 4) and _multiples("") == ()


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device must be cpu.*, got tpu"):
        _device("tpu")
    with pytest.raises(UserError, match="--dtype must be float32 or bfloat16, got int8"):
        evaluate(tmp_path, dtype="int8", lengths="")
    with pytest.raises(IsADirectoryError):
        _write({}, tmp_path)
    _write({"a": 1}, tmp_path / "made" / "file.json")
    assert json.loads((tmp_path / "made" / "file.json").read_text()) == {"a": 1}
