"""The decoding benchmark runs, and does not time a model whose results are wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import decode
from megatron_mosa.hf.rows_mosa import SelectedRows


def test_it_runs_at_toy_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["decode", "--toy", "--batch", "1", "3", "--context", "70", "--steps", "4", "--output", tmp_path / "o.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    decode.main()
    content = json.loads((tmp_path / "o.json").read_text())
    assert [row["model"] for row in content["rows"]] == [name for name in decode.MODELS for _ in range(2)]
    assert all(row["tokens_per_second"] > 0 and row["check"] < 1e-4 for row in content["rows"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(content["rows"])


def test_thresholds_select_the_intended_share() -> None:
    config = decode.MosaConfig(**(decode.SMALL | decode.TOY | decode.MODELS["equal perplexity"]))
    model = decode.build(config, "cpu", torch.float32)
    with torch.no_grad():
        cache = model(torch.randint(96, (1, 4000)), use_cache=True)[decode.CACHE]
    share = sum(float(layer.mosa.counts.float().mean()) for layer in cache.layers) / 2 / 4000
    assert 0.8 / 32 < share < 1.25 / 32


def test_a_wrong_cache_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SelectedRows.read

    def wrong(rows: SelectedRows, *index: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        keys, values = right(rows, *index)
        return keys, values.roll(1, dims=-2)

    monkeypatch.setattr(SelectedRows, "read", wrong)
    with pytest.raises(SystemExit, match=r"decoding is not the forward pass: logits differ by .*; nothing is timed"):
        decode.check(decode.MODELS["equal FLOPs"], "cpu")
