"""Progress of long work."""

from __future__ import annotations

import sys
from typing import Any

from megatron_mosa.utils.files import tolerating


def progress(total: int | None, description: str, initial: int = 0, unit: str = "B") -> Any:
    """Return a progress bar on stderr, over bytes or another unit; with a known total it shows the time left."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log file needs no animation
    return tqdm(total=total, initial=initial, desc=description, unit=unit, unit_scale=True, mininterval=interval)


def say(text: str) -> None:
    """Print a line at once. Long work goes on if the output is full or its reader has left, as ``tee`` may."""
    with tolerating("the output lacks some lines"):
        print(text, flush=True)
