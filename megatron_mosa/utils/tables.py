"""A console that prints tables whole."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_COLUMNS_OF_A_FILE = 140


def table_console(*, highlight: bool = True) -> Console:
    """Return a console for tables on stdout. Without COLUMNS, a file or a pipe has no width, and gets one with room."""
    from rich.console import Console  # slow to import

    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(markup=False, highlight=highlight, width=None if has_width else _COLUMNS_OF_A_FILE)
