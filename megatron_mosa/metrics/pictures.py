"""Pictures, drawn into files."""

from __future__ import annotations

from typing import Any

from megatron_mosa.errors import RunError


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
