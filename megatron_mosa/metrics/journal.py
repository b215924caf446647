"""metrics.jsonl, the record of a run: one JSON object per line."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mosa.utils import counted, finite, naming, parse_json, write_atomically

NON_CAUSAL = "NON-CAUSAL: heads select tokens with the whole sequence in view"
_TOO_LARGE = 1e18  # for what a run counts or measures
_NUMBERS = (
    "tokens", "skipped_tokens", "loss", "validation_loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu",
)  # fmt: skip
"""Values of a line that must be numbers, or null for one that was not finite."""


def causality_label(is_causal: bool) -> str:
    """Return the label to print next to every loss: "causal" or ``NON_CAUSAL``."""
    return "causal" if is_causal else NON_CAUSAL


class Journal:
    """Appends to a run's metrics.jsonl; a resumed run first drops the lines of steps that it will run again."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        self.damage = _set_aside(path) if path.exists() else None
        """One line about an earlier file with lines that were no metrics, which has been kept under another name."""

        lines = [line for line in read_journal(path) if line["step"] <= resumed_step]
        self.last_training_step = max((line["step"] for line in lines if kind(line) == "train"), default=0)
        """The step of the last training line; 0 without one."""
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system.

        Raises:
            OSError: it could not be written; none of it is in the file.
        """
        content = json.dumps(finite(line), allow_nan=False) + "\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(content)
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)  # or a later line would be appended to half of this one
            raise
        if kind(line) == "train":
            self.last_training_step = line["step"]


def kind(line: dict[str, Any]) -> str:
    """Return the kind of a line, "train" or "validation"."""
    return "validation" if "validation_loss" in line else "train"


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line under their names in TensorBoard and W&B; null becomes NaN."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if key in ("step", "causal"):
            continue
        values = {f"{key}/layer_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
        found |= {f"{kind(line)}/{name}": math.nan if v is None else v for name, v in values.items()}
    return found


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return all complete lines, without a last line that a crash cut off, and without damaged ones."""
    return [line for _, line in _parsed(path) if line is not None]


def _parsed(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Return each line of the file, and what it says; None: no metrics of a step."""
    if not path.is_file():
        return []
    found: list[tuple[str, dict[str, Any] | None]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            line = None
        found.append((text, line if _is_metrics(line) else None))
    return found


def _is_metrics(line: Any) -> bool:
    """Return whether a line could have been written by a run: a step, and numbers wherever numbers are read."""
    if not isinstance(line, dict) or not isinstance(line.get("step"), int) or isinstance(line["step"], bool):
        return False
    values = [line["step"], *(line[name] for name in _NUMBERS if line.get(name) is not None)]
    if not all(isinstance(value, int | float) and abs(value) < _TOO_LARGE for value in values):  # NaN is not below it
        return False
    return not 0 < abs(line.get("tokens_per_second") or 0) < 1 / _TOO_LARGE


def _set_aside(path: Path) -> str | None:
    """Keep a copy of a file with damaged lines, besides a last one that a crash cut off; return a line about it."""
    damaged = sum(line is None for _, line in _parsed(path)[:-1])
    if not damaged:
        return None
    names = (f"damaged-{path.name}", *(f"damaged-{number}-{path.name}" for number in range(2, 1000)))
    copy = next(copy for name in names if not (copy := path.with_name(name)).exists())
    with naming(copy):
        shutil.copyfile(path, copy)
    return f"{path} has {counted(damaged, 'damaged line')}, left out from now on; the whole file is kept as {copy.name}"


@dataclass(frozen=True)
class RunTotals:
    """What a run has done so far, from the lines of its journal."""

    steps: int
    tokens: int
    seconds: float
    """inside steps: without validation, checkpoints and starts"""

    tokens_per_second: float
    mfu: float
    """mean over the time inside steps"""

    @property
    def duration(self) -> str:
        """``seconds`` as H:MM:SS."""
        whole = round(self.seconds)
        return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def run_totals(lines: list[dict[str, Any]]) -> RunTotals:
    """Add up the training lines of ``read_journal``."""
    tokens, seconds, work, last = 0, 0.0, 0.0, 0
    for line, taken, share in timed_lines(lines):
        tokens, seconds, work = tokens + taken, seconds + share, work + share * (line.get("mfu") or 0.0)
        last = line["step"] if "tokens_per_second" in line else last
    return RunTotals(last, tokens, seconds, tokens / seconds if seconds else 0.0, work / seconds if seconds else 0.0)


def timed_lines(lines: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], int, float]]:
    """Yield each line with the tokens of the steps taken since the training line before, and the seconds inside them.

    Both are 0 for a validation line.
    """
    before = 0
    for line in lines:
        tokens, seconds = 0, 0.0
        if "tokens_per_second" in line and line.get("tokens") is not None:
            taken = max(line["tokens"] - before - (line.get("skipped_tokens") or 0), 0)
            before = line["tokens"]
            if speed := line["tokens_per_second"]:
                tokens, seconds = taken, taken / speed
        yield line, tokens, seconds
