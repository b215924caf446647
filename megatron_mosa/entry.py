"""What every entry point does alike: a user's mistake is one line and exit code 2; known noise is kept quiet."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from megatron_mosa.errors import UserError


def run(program: Callable[[], object]) -> int:
    """Run a program; return its exit code: 0 done, 2 wrong use. Our own bugs keep their traceback."""
    # Megatron-core warns at import of every optional package that is absent; the README says what that means.
    warnings.filterwarnings("ignore", module=r"(megatron\.core|deepspeed|torch)\b.*")
    try:
        program()
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a node
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
