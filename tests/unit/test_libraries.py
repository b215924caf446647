"""Warnings of libraries stay out of the terminal: known noise always, the others during a run, which logs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging, sys, warnings
from pathlib import Path
from megatron_mosa.entry import run
from megatron_mosa.utils import log_libraries

def program():
    log, quiet = sys.argv[1:]
    if log:
        log_libraries(None if quiet else Path(log))
    logging.getLogger("megatron.core.models.gpt.gpt_model").warning("GPTModel IS DEPRECATED.")
    logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
    logging.getLogger("megatron.core.utils").warning("something else")
    logging.getLogger("DeepSpeed").warning("of DeepSpeed")
    logging.getLogger("megatron.core.utils").error("an error")
    logging.getLogger("megatron_mosa.data.hub").warning("one of ours")
    warnings.warn("of Python", stacklevel=1)

sys.exit(run(program))
"""


def messages(log: Path | str, quiet: str = "") -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(log), quiet], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_a_program_drops_only_known_noise() -> None:
    found = messages("")
    assert found[:4] == ["something else", "of DeepSpeed", "an error", "one of ours"]
    assert "of Python" in found[4]


@pytest.mark.parametrize("is_quiet", [False, True])
def test_a_run_logs_warnings_and_prints_errors(tmp_path: Path, is_quiet: bool) -> None:
    log = tmp_path / "libraries.log"
    assert messages(log, "quiet" if is_quiet else "") == ["an error", "one of ours"]
    assert log.exists() is not is_quiet
    if not is_quiet:
        lines = [line.partition("] ")[2] for line in log.read_text().splitlines()]
        assert lines[0] == "megatron.core.models.gpt.gpt_model: GPTModel IS DEPRECATED."
        assert len(lines) == 7 and "of Python" in lines[6]


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    assert messages(tmp_path / "none" / "libraries.log") == ["an error", "one of ours"]
