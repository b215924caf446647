"""A console that prints tables whole."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_COLUMNS_OF_A_FILE = 140


def table_console(*, highlight: bool = True) -> Console:
    """Return a console for tables on stdout. A file or a pipe has no width of its own, and gets one with room."""
    from rich.console import Console  # slow to import

    asked = os.environ.get("COLUMNS", "")
    wanted = max(_COLUMNS_OF_A_FILE, int(asked) if asked.isdecimal() else 0)
    return Console(markup=False, highlight=highlight, width=None if sys.stdout.isatty() else wanted)
