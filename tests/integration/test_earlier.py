"""Files of an earlier version of this project still load, resume and convert.

``earlier/2026-11.tar.xz`` holds a configuration that names every key, a dataset, a run of 4 of 8 steps with its
checkpoint, and an exported model, all written by the commit before the packages were rearranged.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.integration.conftest import Runner

# Steps 5 to 8 of the run and its last validation, as computed by that version.
LOSSES = [5.643556594848633, 5.625885963439941, 5.614419937133789, 5.617871284484863]
VALIDATION_LOSS = 5.594973087310791
GENERATED = "\ufffd\ufffd\ufffdH\ufffd\ufffdoutW\n"


@pytest.fixture
def earlier(tmp_path: Path) -> Runner:
    """The directory of the unpacked archive, without the overrides of other tests."""
    with tarfile.open(Path(__file__).parent / "earlier" / "2026-11.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    found = Runner(tmp_path)
    found.config, found.overrides = str(tmp_path / "config.yaml"), []
    return found


def test_files_of_an_earlier_version_still_load(earlier: Runner) -> None:
    for command in (
        ["data", "verify", "data"],
        ["checkpoint", "inspect", "runs/run", "--full"],
        ["checkpoint", "verify", "runs/run", "export", "--no-logits"],
        ["checkpoint", "import", "export", "imported", "--from", "hf"],
    ):
        done = earlier.mosa(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    done = earlier.mosa("generate", "export", "--prompt", "the router", "--max-new-tokens", "8", "--temperature", "0")
    assert (done.returncode, done.stdout) == (0, GENERATED), done.stderr
    earlier.pretrain("run", processes=1)
    lines = [json.loads(line) for line in (earlier.folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line][4:] == pytest.approx(LOSSES, rel=1e-6)
    assert lines[-1]["validation_loss"] == pytest.approx(VALIDATION_LOSS, rel=1e-6)
