"""Metrics of a run: hardware limits, journal, loss plot and selection statistics."""

from typing import TYPE_CHECKING

from megatron_mosa.utils import lazy_face

if TYPE_CHECKING:
    from megatron_mosa.metrics.hardware import peak_flops, peak_memory_gib
    from megatron_mosa.metrics.journal import (
        NON_CAUSAL,
        Journal,
        RunTotals,
        causality_label,
        kind,
        read_journal,
        run_totals,
        scalars,
        timed_lines,
    )
    from megatron_mosa.metrics.pictures import load_pyplot, save_figure
    from megatron_mosa.metrics.plot import causality_suffix, plot_losses
    from megatron_mosa.metrics.selection import recorded_selection, selection_statistics

__all__ = [
    "NON_CAUSAL",
    "Journal",
    "RunTotals",
    "causality_label",
    "causality_suffix",
    "kind",
    "load_pyplot",
    "peak_flops",
    "peak_memory_gib",
    "plot_losses",
    "read_journal",
    "recorded_selection",
    "run_totals",
    "save_figure",
    "scalars",
    "selection_statistics",
    "timed_lines",
]

__getattr__, __dir__ = lazy_face(__name__, __file__)
