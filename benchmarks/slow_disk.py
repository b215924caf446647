"""A run on a slow disk: ``python -m benchmarks.slow_disk SECONDS CONFIG [section.key=value ...]`` under a launcher.

Every checkpoint takes SECONDS longer to write than it does. Everything else is as with ``pretrain_mosa.py``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from megatron_mosa.checkpoint import store
from megatron_mosa.entry import run

_write_state = store.write_state


def main() -> None:
    """Train, with ``write_state`` delayed in the thread that writes checkpoints."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from pretrain_mosa import main as pretrain

    try:
        seconds = float(sys.argv[1])
    except (IndexError, ValueError):
        raise SystemExit("usage: python -m benchmarks.slow_disk SECONDS CONFIG [section.key=value ...]") from None
    del sys.argv[1]

    def write_slowly(*arguments: Any) -> None:
        time.sleep(seconds)
        _write_state(*arguments)

    store.write_state = write_slowly
    sys.exit(run(pretrain))


if __name__ == "__main__":
    main()
