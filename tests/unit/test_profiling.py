"""``train.profile_steps``: which steps and ranks are recorded, and what is written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_mosa.config.rules import check_world_size
from megatron_mosa.errors import UserError
from megatron_mosa.train.callbacks.profiling import Profiling
from tests.distributed.tasks import tiny_config


@pytest.mark.parametrize(("rank", "written"), [(0, []), (1, ["step-00000003-rank-1.json.gz"])])
def test_chosen_steps_of_chosen_ranks_are_written(tmp_path: Path, rank: int, written: list[str]) -> None:
    config = tiny_config(train__profile_steps=[3, 1, 9], train__profile_ranks=[1, 2])
    layout = SimpleNamespace(rank=rank, device=torch.device("cpu"))
    trainer = SimpleNamespace(config=config, layout=layout, state=SimpleNamespace(step=1), last_step=8)
    notes: list[str] = []
    callback = Profiling(SimpleNamespace(note=notes.append), tmp_path)  # type: ignore[arg-type]
    callback.on_start(trainer)  # type: ignore[arg-type]
    assert notes == ["train.profile_steps=[1, 9] are not profiled: this start takes steps 2 to 8"]
    for step in (2, 3):
        with callback.around_step(trainer, step):  # type: ignore[arg-type]
            torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    assert [path.name for path in sorted(tmp_path.glob("profile/*"))] == written
    for name in written:
        events = json.loads(gzip.decompress((tmp_path / "profile" / name).read_bytes()))["traceEvents"]
        assert "aten::mm" in {event.get("name") for event in events}


def test_steps_and_ranks_that_never_come_are_refused() -> None:
    with pytest.raises(UserError, match=r"^train.profile_steps must be at most train.steps=100, got 101$"):
        tiny_config(train__profile_steps=[5, 101])
    with pytest.raises(UserError, match=r"^train.profile_steps must be at least 1, got \[0\]$"):
        tiny_config(train__profile_steps=[0])
    with pytest.raises(UserError, match=r"^train.profile_ranks must be less than the number of ranks, 2, got 2$"):
        check_world_size(tiny_config(train__profile_ranks=[0, 2], train__micro_batch_size=2), 2)
