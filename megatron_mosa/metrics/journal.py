"""metrics.jsonl: one JSON object a line, the record of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_mosa.utils.files import write_atomically

NON_CAUSAL = "NON-CAUSAL: expert choice selects with the whole sequence in view"


def causality(is_causal: bool) -> str:
    """What is said beside a loss, wherever one is printed."""
    return "causal" if is_causal else NON_CAUSAL


class Journal:
    """Appends to a run's metrics.jsonl; on resume, lines of steps that will be run again are dropped first."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        lines = [line for line in read_journal(path) if line["step"] <= resumed_step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; it is on disk when this returns, as far as the operating system goes."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def kind(line: dict[str, Any]) -> str:
    """What a line is of: "train" or "validation"."""
    return "validation" if "validation_loss" in line else "train"


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line under the names that TensorBoard and W&B show; what the file has as null is NaN."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if key in ("step", "causal"):
            continue
        values = {f"{key}/layer_{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value}
        found |= {f"{kind(line)}/{name}": math.nan if v is None else v for name, v in values.items()}
    return found


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
