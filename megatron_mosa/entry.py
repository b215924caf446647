"""What every entry point does alike: a user's mistake is one line and exit code 2; known noise is kept quiet."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from megatron_mosa.errors import RunError, UserError


def run(program: Callable[[], object]) -> int:
    """Run a program; return its exit code: 0 done, 1 failed, 2 wrong use. Our own bugs keep their traceback."""
    # Megatron-core warns at import of every optional package that is absent; the README says what that means.
    warnings.filterwarnings("ignore", module=r"(megatron\.core|deepspeed|torch)\b.*")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    try:
        program()
    except (UserError, RunError) as error:
        if local_rank == 0:  # once a node
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0
