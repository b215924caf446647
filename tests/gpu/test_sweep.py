"""``mosa sweep`` on GPUs: processes that measure with and without CUDA graphs, one layout after the other."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import memory_tasks, tasks
from tests.distributed.pool import WorkerPools
from tests.integration.conftest import ROOT, TINY

SETTINGS = [
    *TINY, "model.hidden_size=64", "model.head_dim=32", "mosa.sparsity=4", "train.precision=bf16",
    "train.deterministic=false", "mosa.num_heads=6",
]  # fmt: skip
LAYOUTS = ["tp=1,zero=1,micro=2", "tp=1,zero=1,micro=4", "tp=1,zero=2,micro=4", "tp=1,zero=3,micro=4"]


def test_layouts_in_reused_processes(tmp_path: Path) -> None:
    counts = [count for count in (1, 2, 4) if count <= torch.cuda.device_count()]
    layouts = [
        f"{layout},processes={count}" for count in counts for layout in LAYOUTS if count == 1 or "zero=1" in layout
    ]
    if counts[-1] > 1:
        layouts += ["tp=2,sp=true,zero=1,micro=2,processes=2", "tp=2,sp=false,zero=3,micro=2,processes=2"]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "megatron_mosa",
        "sweep",
        str(ROOT / "configs" / "quickstart.yaml"),
    ]
    command += [*SETTINGS, "--random-tokens", "--steps", "3", "--warmup", "2", "--output", str(tmp_path / "out")]
    command += [word for layout in layouts for word in ("--layout", layout)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=580,
        check=False,
    )  # fmt: skip
    logs = "".join(f"\n== {log}\n{log.read_text()[-2000:]}" for log in sorted((tmp_path / "out" / "logs").glob("*")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(layouts) and {row["status"] for row in rows} == {"reference", "ok"}, logs
    for row in rows:
        assert float(row["ms_matrix_products"]) > 0 and float(row["mfu"]) > 0 and row["note"] == ""
        assert "one CUDA graph" in row["acceleration"]
        if row["processes"] != "1":
            assert float(row["ms_collectives"]) > 0
            # The first is of one rank, the second the mean of two, of which one may have waited for the other.
            assert 0 <= float(row["exposed_communication_share"]) <= float(row["communication_share"]) * 2
    # Engines free their memory, so that the next one begins in the same processes.
    assert done.stdout.count("starting 1 process") == 1, done.stdout
    for file in (tmp_path / "out" / "layouts").glob("*.json"):
        print(file.name, json.loads(file.read_text())["phase_seconds"])


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_an_engine_of_graphs_frees_its_memory(workers: WorkerPools, zero_stage: int) -> None:
    config = tasks.tiny_config(
        model__hidden_size=512, model__head_dim=32, model__num_layers=4, data__sequence_length=128,
        data__vocab_size=8192, train__precision="bf16", parallel__zero_stage=zero_stage,
    )  # fmt: skip
    ((acceleration, left),) = workers(1).run(memory_tasks.left_on_gpu, config)
    assert "one CUDA graph" in acceleration
    assert max(left) < 50e6, left  # weights, gradients and moments are 360 MB
