"""The time and memory of a model's step, measured by ``mosa bench`` in processes of its own while nothing else runs."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosa.config import Config, config_to_dict, save_config
from megatron_mosa.errors import RunError
from megatron_mosa.tools.processes import end, end_with_parent
from megatron_mosa.utils import write_atomically

_TRAIN = ("micro_batch_size", "global_batch_size", "precision", "recompute", "acceleration", "apex", "deterministic")


@dataclass(frozen=True)
class Timing:
    """A measured step."""

    seconds: float
    """Median."""

    peak_memory_gib: float
    device: str


@dataclass(frozen=True)
class Timings:
    """Measurements below a grid's folder, of which each is taken once for each device."""

    folder: Path
    device: str
    steps: int
    warmup: int
    launch: Callable[[Sequence[str]], tuple[list[str], dict[str, str]]]
    """Arguments of ``mosa`` -> the command of all ranks of a cell, and its environment."""

    def find(self, config: Config, vocab_size: int) -> Timing | None:
        """Return the measurement of a model on this device, if there is one."""
        path = self._path(config, vocab_size)
        return _read(path) if path.is_file() else None

    def find_anywhere(self, config: Config, vocab_size: int) -> Timing | None:
        """Return the measurement of a model on this device, or else on the only other one that has one."""
        if (found := self.find(config, vocab_size)) is not None:
            return found
        others = list((self.folder / "timings").glob(f"{_model_hash(config, vocab_size)}-*.json"))
        return _read(others[0]) if len(others) == 1 else None

    def measure(self, config: Config, vocab_size: int) -> Timing:
        """Return the measurement of a model, taken now if there is none.

        Raises:
            RunError: it failed.
        """
        if (found := self.find(config, vocab_size)) is not None:
            return found
        path = self._path(config, vocab_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = replace(config, data=replace(config.data, vocab_size=vocab_size, path="unread", blend=[]))
        save_config(settings, path.with_suffix(".yaml"))
        new, log = path.with_suffix(".new"), path.with_suffix(".log")
        arguments = ["bench", str(path.with_suffix(".yaml")), "--steps", str(self.steps), "--warmup", str(self.warmup)]
        command, environment = self.launch([*arguments, "--output", str(new)])
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, preexec_fn=end_with_parent
            )
        try:
            code = process.wait()
        finally:
            end(process)
        if code:
            raise RunError(f"mosa bench of a model failed with exit code {code}: {last_line(log)}; see {log}")
        write_atomically(path, new.read_text(encoding="utf-8"))
        new.unlink()
        return _read(path)

    def _path(self, config: Config, vocab_size: int) -> Path:
        device = re.sub(r"\W+", "_", self.device)
        return self.folder / "timings" / f"{_model_hash(config, vocab_size)}-{device}.json"


def _read(path: Path) -> Timing:
    found = json.loads(path.read_text(encoding="utf-8"))
    return Timing(statistics.median(found["milliseconds"]) / 1000, found["allocated_gib"], found["device"])


def _model_hash(config: Config, vocab_size: int) -> str:
    """Return a hash of what the time of a step depends on, besides the device."""
    tree = config_to_dict(config)
    content: list[Any] = [tree[section] for section in ("model", "mosa", "parallel")]
    content += [tree["train"][key] for key in _TRAIN] + [config.data.sequence_length, vocab_size]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def last_line(log: Path) -> str:
    """Return the line of a log that says why a program failed: its last error, or its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")[:500]
