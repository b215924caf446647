"""``mosa doctor`` as two processes over gloo that act as two nodes, started as by a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from tests.distributed.pool import free_port
from tests.loaded import loaded_python

ROOT = Path(__file__).parents[2]


def start(rank: int, port: int, *options: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{rank + 1}"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [loaded_python(), "-m", "megatron_mosa", "doctor", "--minimum-disk", "0", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Wait for the processes; return exit code, standard output and standard error of each."""
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


def test_a_healthy_job_prints_one_table_and_exits_with_0(tmp_path: Path) -> None:
    port, options = free_port(), ("--run-directory", str(tmp_path / "runs"), "--json", str(tmp_path / "doctor.json"))
    first, second = finish(*(start(rank, port, *options) for rank in (0, 1)))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert first[1].count("verdict: healthy (2 nodes, 2 ranks") == 1 and first[2] == ""
    assert second[1:] == ("", "")  # only rank 0 prints
    content = json.loads((tmp_path / "doctor.json").read_text())
    assert content["bad_nodes"] == []
    assert [rank["node"] for rank in content["ranks"]] == ["n1", "n2"]
    for rank in content["ranks"]:
        assert rank["facts"]["all-reduce"] > 0 and rank["facts"]["all-gather"] > 0
        assert abs(rank["facts"]["clock_offset_s"]) < 0.5  # they share one clock
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]


def test_a_run_directory_that_is_not_shared_names_its_node(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "theirs").mkdir()
    found = ("--json", str(tmp_path / "doctor.json"))
    first, second = finish(
        start(0, port, "--run-directory", str(tmp_path / "ours"), *found),
        start(1, port, "--run-directory", str(tmp_path / "theirs"), *found),
    )
    assert (first[0], second[0]) == (1, 1), (first, second)
    errors = first[2].splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"error: node n2: run directory {tmp_path}/theirs is not shared")
    assert "verdict: bad (2 nodes, 2 ranks): n2" in first[1] and second[1:] == ("", "")
    assert json.loads((tmp_path / "doctor.json").read_text())["bad_nodes"] == ["n2"]


def test_a_rank_that_never_joins_is_one_error_line(tmp_path: Path) -> None:
    port, absent_port, started = free_port(), free_port(), time.monotonic()
    first, second = finish(
        start(0, port, "--timeout", "8", "--json", str(tmp_path / "doctor.json")),
        start(1, absent_port, "--timeout", "8"),  # another job, whose rank 0 never starts
    )
    assert time.monotonic() - started < 60  # 8 s, and starting two processes on a busy machine
    assert (first[0], second[0]) == (1, 1)
    assert first[1] == "" and first[2].count("\n") == 1
    assert first[2].startswith(f"error: 1 of 2 ranks joined at 127.0.0.1:{port} within 8 s, missing rank 1; check ")
    assert second[1] == "" and second[2].count("\n") == 1
    assert second[2].startswith(f"error: node n2: rank 1 of 2 cannot reach 127.0.0.1:{absent_port}; check ")
    assert json.loads((tmp_path / "doctor.json").read_text())["is_bad"] is True
