"""Megatron's own distributed checkpoint of a MoSA model, saved at TP 2 and loaded at TP 1 and 4."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.distributed import tasks
from tests.distributed.pool import WorkerPools


def test_sharded_state_dict_changes_tensor_parallel_size(workers: WorkerPools, tmp_path: Path) -> None:
    path = str(tmp_path / "megatron")
    two = tasks.tiny_config(parallel__tensor_model_parallel_size=2)
    saved = workers(2).run(tasks.save_megatron_checkpoint, two, path)[0]
    for size in (1, 4):
        config = tasks.tiny_config(parallel__tensor_model_parallel_size=size)
        loaded = workers(size).run(tasks.load_megatron_checkpoint, config, path)[0]
        torch.testing.assert_close(loaded, saved, rtol=1e-5, atol=1e-6)
