"""Ranks end when another one dies, though they wait for ever, and stay when it ends in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_mosa.exit_codes import DONE, FAILED

RANKS = 3
PROGRAM = f"""
import os, pathlib, sys, time
from megatron_mosa.config import load_config
from megatron_mosa.resilience import ResilienceServices, services
from types import SimpleNamespace

rank, folder, ending = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
services.PEER_GRACE_SECONDS = 1.0

class Hosts:
    def max(self, port):
        file = folder / "port"
        if rank == 0:
            file.with_suffix(".new").write_text(str(port))
            file.with_suffix(".new").rename(file)
        while not file.exists():
            time.sleep(0.01)
        return int(file.read_text())

config = load_config(sys.argv[4], ["resilience.hang_timeout=0"])
own = ResilienceServices.begin(config, folder, rank)
own.join(SimpleNamespace(rank=rank, world_size={RANKS}), Hosts())
if os.fork() == 0:  # like a loader process, which outlives its parent for a while
    time.sleep(30)
    os._exit(0)
(folder / f"ready-{{rank}}").touch()
own.watchdog.beat("taking step 7")
if ending == "in order":
    if rank == 1:
        own.peers.leave()
        os._exit(0)
    time.sleep(3)
    own.peers.leave()
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize(("dying", "ending"), [(0, "killed"), (2, "killed"), (1, "in order")])
def test_the_other_ranks_end_after_a_death(tmp_path: Path, dying: int, ending: str) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path), ending, config], env=environment,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < RANKS and time.monotonic() < deadline:
        time.sleep(0.02)
    if ending == "killed":
        processes[dying].kill()
    begin = time.monotonic()
    codes = [process.wait(timeout=30) for process in processes]
    if ending == "in order":
        assert codes == [DONE] * RANKS
        return
    assert time.monotonic() - begin < 10  # the child of the dead rank lives on, without its sockets
    for rank, process in enumerate(processes):
        if rank == dying:
            assert codes[rank] == -signal.SIGKILL
            continue
        assert codes[rank] == FAILED
        stacks = (tmp_path / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert f"rank {dying} has died while rank {rank} was taking step 7" in stacks
        assert process.stderr is not None and f"rank {dying} has died" in process.stderr.read()
