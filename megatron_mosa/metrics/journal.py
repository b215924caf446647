"""metrics.jsonl, the record of a run: one JSON object per line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_mosa.utils import write_atomically

NON_CAUSAL = "NON-CAUSAL: expert choice selects with the whole sequence in view"


def causality_label(is_causal: bool) -> str:
    """Return the label to print next to every loss: "causal" or ``NON_CAUSAL``."""
    return "causal" if is_causal else NON_CAUSAL


class Journal:
    """Appends to a run's metrics.jsonl; a resumed run first drops the lines of steps that it will run again."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        lines = [line for line in read_journal(path) if line["step"] <= resumed_step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot hold, by None."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    """Return all complete lines, without a last line that a crash cut off."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
