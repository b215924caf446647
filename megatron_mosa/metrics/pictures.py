"""Pictures, drawn into files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from megatron_mosa.errors import RunError
from megatron_mosa.utils import write_atomically


def load_pyplot() -> Any:
    """Return ``matplotlib.pyplot``, which takes 0.6 s to import, for drawing into files.

    Raises:
        RunError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise RunError("pictures need matplotlib, which is not installed (pip install matplotlib)") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure of pyplot as PNG, whole or not at all, and close it."""
    from matplotlib import pyplot as plt

    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    plt.close(figure)
    write_atomically(path, content.getvalue())
