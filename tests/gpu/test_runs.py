"""Whole runs of pretrain_mosa.py on a GPU: stopped, resumed, rewound, and moved between the paths of the step."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_mosa.exit_codes import DONE, STOPPED
from megatron_mosa.metrics import read_journal
from tests.integration.conftest import ROOT, TINY

SETTINGS = [
    *TINY, "model.hidden_size=64", "model.head_dim=32", "mosa.sparsity=4", "parallel.tensor_model_parallel_size=1",
    "train.precision=bf16", "train.deterministic=true", "optimizer.learning_rate=0.01",
    "resilience.spike_window=3", "resilience.spike_sigmas=3",
]  # fmt: skip
RUNS: dict[str, list[tuple[list[str], int]]] = {
    "whole": [([], DONE)],
    "stopped": [(["fault_injection.fault=SIGTERM", "fault_injection.step=6"], STOPPED), ([], DONE)],
    "moved": [
        (["train.stop_after_step=4"], DONE),
        (["train.stop_after_step=7", "train.acceleration=none"], DONE),
        ([], DONE),
    ],
    "plain": [(["train.acceleration=none"], DONE)],
    "rewound": [(["fault_injection.fault=garbage", "fault_injection.step=8", "resilience.on_spike=rewind"], DONE)],
    "told": [(["train.skip_steps=[8]"], DONE)],
}
"""For each run its starts: overrides and exit code."""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """All runs side by side on one GPU, and what they printed."""
    folder = tmp_path_factory.mktemp("runs")
    common = [
        str(ROOT / "configs" / "quickstart.yaml"),
        *SETTINGS,
        f"data.path={folder}/data",
        f"run.directory={folder}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
        )

    built = call("-m", "megatron_mosa", "data", "build", *common)
    assert built.returncode == DONE, built.stdout + built.stderr

    def run(name: str) -> str:
        printed = ""
        for overrides, code in RUNS[name]:
            done = call(str(ROOT / "pretrain_mosa.py"), *common, f"run.name={name}", *overrides)
            printed += done.stdout
            assert done.returncode == code, done.stdout + done.stderr
        return printed

    with ThreadPoolExecutor(len(RUNS)) as threads:
        return folder, dict(zip(RUNS, threads.map(run, RUNS), strict=True))


def losses(folder: Path, name: str) -> list[float]:
    """Training losses by step."""
    lines = [line for line in read_journal(folder / name / "metrics.jsonl") if "loss" in line]
    return [line["loss"] for line in lines]


def test_steps_are_graphs(outputs: tuple[Path, dict[str, str]]) -> None:
    folder, printed = outputs
    for name, output in printed.items():
        assert ("each micro-batch one CUDA graph" in output) == (name != "plain"), output
    assert "acceleration: none: train.acceleration=none" in printed["moved"]
    assert len(losses(folder, "whole")) == 10


def test_a_signal_in_a_step_loses_nothing(outputs: tuple[Path, dict[str, str]]) -> None:
    folder, printed = outputs
    assert "resumed from" in printed["stopped"]
    assert losses(folder, "stopped") == losses(folder, "whole")


def test_a_checkpoint_moves_between_the_paths(outputs: tuple[Path, dict[str, str]]) -> None:
    folder, _ = outputs
    assert losses(folder, "moved")[:4] == losses(folder, "whole")[:4]
    assert losses(folder, "moved") == pytest.approx(losses(folder, "whole"), rel=5e-3)
    assert losses(folder, "plain") == pytest.approx(losses(folder, "whole"), rel=5e-3)


def test_rewinding_repeats_the_steps_without_the_spike(outputs: tuple[Path, dict[str, str]]) -> None:
    folder, printed = outputs
    assert "step 8 will be skipped" in printed["rewound"]
    assert losses(folder, "rewound") == losses(folder, "told")
