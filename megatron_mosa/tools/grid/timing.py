"""What is measured of a model while nothing else runs on its device, each in a process of its own.

The time and memory of a step by ``mosa bench``, and the time of a decoded token by ``mosa decode-bench``.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mosa.config import Config, config_to_dict, save_config
from megatron_mosa.errors import RunError
from megatron_mosa.tools.grid.grid import Evaluation
from megatron_mosa.tools.grid.plan import Model
from megatron_mosa.tools.processes import Process, end, start
from megatron_mosa.utils import load_json, read_record, write_atomically

_TRAIN = ("micro_batch_size", "global_batch_size", "precision", "recompute", "acceleration", "apex", "deterministic")


@dataclass(frozen=True)
class Timing:
    """A measured step."""

    seconds: float
    """Median."""

    peak_memory_gib: float
    device: str = ""


@dataclass(frozen=True)
class Decoding:
    """Measured decoding."""

    milliseconds: Mapping[str, float]
    """Of a step, which adds one token to each sequence, by the number of sequences."""

    context: int
    """Tokens before."""

    device: str = ""


@dataclass(frozen=True)
class Measurement:
    """A measurement that runs."""

    program: str
    process: Process
    new: Path
    """What the program writes."""

    path: Path
    """Where that belongs once it is complete."""

    log: Path

    def is_running(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """End it; without effect if it has ended."""
        end(self.process)

    def finish(self) -> None:
        """Wait for its end, and keep the result.

        Raises:
            RunError: it failed.
        """
        try:
            code = self.process.wait()
        finally:
            self.stop()
        if code:
            raise RunError(
                f"mosa {self.program} of a model failed with exit code {code}: {last_line(self.log)}; see {self.log}"
            )
        write_atomically(self.path, self.new.read_text(encoding="utf-8"))
        self.new.unlink()


@dataclass(frozen=True)
class Timings:
    """Measurements below a grid's folder, of which each is taken once for each device."""

    folder: Path
    device: str
    processes: int
    """Ranks of a step."""

    steps: int
    warmup: int
    launch: Callable[[Sequence[str], str, int | None], tuple[list[str], dict[str, str]]]
    """Arguments of ``mosa``, a slot of the launcher, ranks (None: those of a cell) -> command and environment."""

    def path(self, config: Config, vocab_size: int) -> Path:
        """Return where the measured step of a model on this device belongs."""
        name = _model_hash(config, vocab_size, self.processes)
        return self.folder / "timings" / f"{name}-{_file_name(self.device)}.json"

    def find(self, config: Config, vocab_size: int) -> Timing | None:
        """Return the measured step of a model on this device, if there is one."""
        return _read(self.path(config, vocab_size))

    def find_anywhere(self, config: Config, vocab_size: int) -> Timing | None:
        """Return the measured step of a model on this device, or else on the only other one that has one."""
        path = _here_or_elsewhere(self.path(config, vocab_size))
        return None if path is None else _read(path)

    def measure(self, config: Config, vocab_size: int, slot: str) -> Timing:
        """Return the measured step of a model, taken now if there is none.

        Raises:
            RunError: it failed.
        """
        if (found := self.find(config, vocab_size)) is not None:
            return found
        self.start(config, vocab_size, slot).finish()
        found = self.find(config, vocab_size)
        assert found is not None
        return found

    def start(self, config: Config, vocab_size: int, slot: str) -> Measurement:
        """Begin to measure the step of a model."""
        path = self.path(config, vocab_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = replace(config, data=replace(config.data, vocab_size=vocab_size, path="unread", blend=[]))
        save_config(settings, path.with_suffix(".yaml"))
        length = ["--steps", str(self.steps), "--warmup", str(self.warmup)]
        return self._start(["bench", str(path.with_suffix(".yaml")), *length], path, slot, None)

    def decoding_path(self, model: Model, evaluation: Evaluation) -> Path:
        """Return where the measured decoding of a model on this device belongs; the same for all runs of a model."""
        return self._decoding_path(model, evaluation, f" {model.dataset.fingerprint}")

    def _decoding_path(self, model: Model, evaluation: Evaluation, dataset: str) -> Path:
        wanted = _model_hash(model.config, model.dataset.vocab_size)
        wanted += f" {evaluation.decode_context} {evaluation.decode}{dataset}"
        name = hashlib.sha256(wanted.encode()).hexdigest()[:16]
        return self.folder / "timings" / "decoding" / f"{name}-{_file_name(self.device)}.json"

    def find_decoding(self, model: Model, evaluation: Evaluation, *, elsewhere: bool = True) -> Decoding | None:
        """Return the measured decoding of a model on this device.

        Args:
            elsewhere: or else on the only other device that has one.
        """
        # Earlier versions gave all corpora one file, which says whose model was measured.
        for dataset in (f" {model.dataset.fingerprint}", ""):
            path = self._decoding_path(model, evaluation, dataset)
            path = _here_or_elsewhere(path) if elsewhere else path
            found = None if path is None else _read_decoding(path, evaluation, None if dataset else model.corpus)
            if found is not None:
                return found
        return None

    def start_decoding(self, model: Model, evaluation: Evaluation, run: Path, slot: str) -> Measurement:
        """Begin to measure the decoding of a trained model.

        Args:
            run: its run directory, with a checkpoint.
        """
        path, data = self.decoding_path(model, evaluation), model.config.data.path
        path.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["decode-bench", str(run), "--context", str(evaluation.decode_context)]
        arguments += ["--batch", ",".join(map(str, evaluation.decode))]
        arguments += ["--data", data] if data else []
        return self._start(arguments, path, slot, 1)

    def _start(self, arguments: Sequence[str], path: Path, slot: str, ranks: int | None) -> Measurement:
        new, log = path.with_name(f"new-{path.name}"), path.with_suffix(".log")
        command, environment = self.launch([*arguments, "--output", str(new)], slot, ranks)
        process = start(command, environment, log)
        return Measurement(arguments[0], process, new, path, log)


def _here_or_elsewhere(path: Path) -> Path | None:
    """Return a measurement's file, or that of the only other device, or None."""
    if path.is_file():
        return path
    others = list(path.parent.glob(f"{path.name.partition('-')[0]}-*.json"))
    return others[0] if len(others) == 1 else None


def _file_name(device: str) -> str:
    return re.sub(r"\W+", "_", device)


def _read(path: Path) -> Timing | None:
    """Return what ``mosa bench`` measured; None if the file is missing or damaged, so that it is measured again."""
    try:
        found = load_json(path)
        seconds = statistics.median(map(float, found["milliseconds"])) / 1000
        return read_record(
            Timing, {"seconds": seconds, "peak_memory_gib": found["allocated_gib"], "device": _device(path, found)}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_decoding(path: Path, evaluation: Evaluation, corpus: str | None = None) -> Decoding | None:
    """Return what ``mosa decode-bench`` measured, or None as ``_read``, or if it is not of a model on that corpus."""
    try:
        found = load_json(path)
        if corpus is not None and Path(found["model"]).name.split("-")[1] != corpus:  # SIZE-CORPUS-MEMBER...
            return None
        times = {str(row["batch"]): row["milliseconds_per_step"] for row in found["rows"]}
        values = {"milliseconds": times, "context": evaluation.decode_context, "device": _device(path, found)}
        return read_record(Decoding, values)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _device(path: Path, found: dict[str, Any]) -> str:
    """Return the device of a measurement; ``mosa bench`` does not tell processors apart, but the file's name does."""
    device = found.get("device", "cpu")
    return path.stem.partition("-")[2] if device == "cpu" else device


def _model_hash(config: Config, vocab_size: int, processes: int = 1) -> str:
    """Return a hash of what the time of a step depends on, besides the device."""
    tree = config_to_dict(config)
    content: list[Any] = [tree[section] for section in ("model", "mosa", "parallel")]
    content += [tree["train"][key] for key in _TRAIN] + [config.data.sequence_length, vocab_size]
    content += [processes] if processes > 1 else []  # so that what one process measured before this counted is kept
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def last_line(log: Path, begin: int = 0) -> str:
    """Return the line of a log that says why a program failed: its last error, or its last line.

    Args:
        begin: bytes of the log that were there before the program was started.
    """
    content = log.read_bytes()[begin:] if log.is_file() else b""  # a job that was cancelled in its queue has none
    text = content.decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")[:500]
