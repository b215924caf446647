"""A large dataset, hashed in the background, is damaged while a run trains on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

from megatron_mosa.data import hashing
from tests.integration.conftest import Runner

# Every dataset counts as large, and hashing starts when the test creates a file. It runs in a real interpreter, because
# the loaded Python has no isolated mode.
CUSTOMIZE = """
from types import SimpleNamespace
from megatron_mosa.data import integrity
integrity.FOREGROUND_BYTES = 0
integrity.hashing = SimpleNamespace(__file__={waiting!r})
integrity.sys = SimpleNamespace(executable={python!r})
"""
WAITING = """
import os, runpy, time
parent = os.getppid()
while not os.path.exists({sign!r}):
    if os.getppid() != parent:
        raise SystemExit(1)
    time.sleep(0.02)
runpy.run_path({program!r}, run_name="__main__")
"""


def wait_for_checkpoint(runner: Runner, name: str) -> None:
    """Wait for the checkpoint of step 2."""
    deadline = time.monotonic() + 120
    while not (runner.folder / "runs" / name / "checkpoints" / "step-00000002").is_dir():
        assert time.monotonic() < deadline, runner.printed(name, "err")
        time.sleep(0.05)


def flip_a_bit(file: Path) -> None:
    """Flip the lowest bit of a token in the middle of the file, in place because the ranks have mapped it."""
    with file.open("r+b") as content:
        place = file.stat().st_size // 4 * 2
        content.seek(place)
        (byte,) = content.read(1)
        content.seek(place)
        content.write(bytes([byte ^ 1]))


def test_a_run_stops_when_its_dataset_is_damaged(runner: Runner, tmp_path: Path) -> None:
    data, sign = tmp_path / "data", tmp_path / "look-now"
    shutil.copytree(runner.folder / "data", data, ignore=shutil.ignore_patterns("index_cache"))
    (tmp_path / "waiting.py").write_text(WAITING.format(sign=str(sign), program=hashing.__file__))
    customize = CUSTOMIZE.format(waiting=str(tmp_path / "waiting.py"), python=sys.executable)
    (tmp_path / "sitecustomize.py").write_text(customize)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    overrides = [
        f"data.path={data}", "train.steps=100000", "checkpoint.interval=2", "validation.interval=100000",
        "data.index_samples=4000", "data.num_workers=0", "logging.tensorboard=false",
    ]  # fmt: skip
    ranks = runner.start("damaged_data", *overrides, PYTHONPATH=path)
    try:
        wait_for_checkpoint(runner, "damaged_data")
        flip_a_bit(data / "train.bin")
        sign.touch()
        codes = [rank.wait(180) for rank in ranks]  # they end by themselves
    finally:
        for rank in ranks:
            rank.kill()
    output, errors = runner.printed("damaged_data", "out"), runner.printed("damaged_data", "err")
    assert codes == [2, 2], output + errors
    assert "hashing 4 files of the dataset in the background" in output and "the dataset is intact" not in output
    assert len(errors.splitlines()) == 1, errors  # no traceback, and one line for both ranks
    found = re.fullmatch(
        rf"error: {data}/train.bin is damaged: its SHA-256 is \w+... instead of the recorded \w+...; "
        r"restore it .*; the run stopped at step (\d+), its last intact checkpoint is (.*)\n",
        errors,
    )
    assert found is not None, errors
    step, checkpoint = int(found[1]), Path(found[2])
    assert checkpoint.is_dir() and 2 <= int(checkpoint.name[5:]) <= step
    status = json.loads((checkpoint.parents[1] / "status.json").read_text())
    assert status["exit_code"] == 2 and "train.bin is damaged" in status["reason"]

    flip_a_bit(data / "train.bin")  # restore the file
    done = runner.run("damaged_data", *overrides, f"train.stop_after_step={step + 1}", PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed from {checkpoint.parent}/step-" in done.stdout
