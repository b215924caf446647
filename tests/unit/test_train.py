"""Schedule, loss, journal and plot of a run, and detection of the wrong apex."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from megatron_mosa.config.schema import OptimizerSection
from megatron_mosa.errors import UserError
from megatron_mosa.metrics import Journal, plot_losses, read_journal
from megatron_mosa.model import language_model_loss
from megatron_mosa.model.mosa_gpt import MosaGPTModel
from megatron_mosa.parallel.apex import reject_wrong_apex
from megatron_mosa.train.report import report
from megatron_mosa.train.schedule import learning_rate


def test_schedule_warms_up_linearly_and_decays_along_a_cosine() -> None:
    options = OptimizerSection(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(step, 104, options) for step in range(1, 105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[53] == pytest.approx(0.55)  # half way down
    for step in (30, 77):
        assert rates[step - 1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / 100)) / 2)
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))


def test_the_other_schedules() -> None:
    options = OptimizerSection(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4, decay_fraction=0.25)

    def rates(schedule: str) -> list[float]:
        options.schedule = schedule
        return [learning_rate(step, 104, options) for step in range(1, 105)]

    assert rates("constant") == [0.25, 0.5, 0.75] + [1.0] * 101
    linear = rates("linear")
    assert linear[3] == 1.0 and linear[-1] == pytest.approx(0.1)
    slopes = [a - b for a, b in itertools.pairwise(linear[3:])]
    assert slopes == pytest.approx([0.009] * 100)
    wsd = rates("wsd")
    assert wsd[3:78] == [1.0] * 75  # up to step 78 = 104 - 26
    assert wsd[78] == pytest.approx(1 - 0.9 / 26) and wsd[-1] == pytest.approx(0.1)
    options.decay_fraction = 0.004  # of less than half a step, and the last one decays
    assert rates("wsd")[3:] == [1.0] * 100 + [pytest.approx(0.1)]


def test_the_loss_covers_counted_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(_: object, tokens: torch.Tensor, positions: torch.Tensor, documents: None, labels: torch.Tensor):
        assert positions.tolist() == [[0, 1, 2]] * 2 and documents is None
        return (10 * tokens + labels).bfloat16()  # [B, T]

    monkeypatch.setattr(GPTModel, "forward", forward)
    model = MosaGPTModel.__new__(MosaGPTModel)
    torch.nn.Module.__init__(model)
    tokens, labels = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[2, 3, 4], [5, 6, 7]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    total, count = language_model_loss(model, tokens, labels, mask)
    assert (total.item(), count.item()) == (12 + 34 + 67, 3)
    assert total.dtype == torch.float32


def test_journal_drops_steps_that_will_run_again_and_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, resumed_step=0)
    for step in range(1, 6):
        journal.write({"step": step, "loss": step / 10})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in read_journal(path)] == [1, 2, 3, 4, 5]
    Journal(path, resumed_step=3).write({"step": 4, "loss": 9.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]


def test_plot(tmp_path: Path) -> None:
    lines = [{"tokens": n, "loss": 5 - n / 10} for n in range(10)]
    lines += [{"tokens": 9, "validation_loss": 4.2, "unigram_entropy": 6.0, "causal": False}]
    plot_losses(lines, tmp_path / "loss.png", "name")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_of_a_run_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"step": 1, "tokens": 8, "loss": 5.0, "tokens_per_second": 4.0, "mfu": 0.1}
    Journal(tmp_path / "metrics.jsonl", resumed_step=0).write(line)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "checkpoints").mkdir()
    report(tmp_path)
    printed = capsys.readouterr().out
    assert "No loss.png:      pictures need matplotlib, which is not installed" in printed
    assert "(metrics.jsonl, checkpoints/)" in printed


def test_the_report_of_a_run_that_diverged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", resumed_step=0)
    journal.write({"step": 1, "tokens": 8, "loss": math.nan, "tokens_per_second": 4.0, "mfu": 0.1})
    losses = {"validation_loss": math.nan, "validation_perplexity": math.nan, "unigram_entropy": 3.0}
    journal.write({"step": 1, "tokens": 8, "causal": True} | losses)
    report(tmp_path)
    assert "Validation loss:  not finite: the training has diverged" in capsys.readouterr().out


def test_the_unrelated_apex_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reject_wrong_apex()  # absent
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    with pytest.raises(UserError, match="is not NVIDIA apex"):
        reject_wrong_apex()
    assert "apex" not in sys.modules  # found without running its code
    (tmp_path / "apex" / "optimizers").mkdir()
    reject_wrong_apex()
