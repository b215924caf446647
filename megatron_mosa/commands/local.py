"""Start a run on this machine, for launch/torchrun/local.sh: ``python -m megatron_mosa.commands.local CONFIG ...``.

One process per visible GPU, or two on a CPU. A single process trains here, without torchrun. In either case torch is
imported only once before the ranks start, which check the configuration before anything that takes long.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_mosa.cluster import torchrun
from megatron_mosa.entry import run
from megatron_mosa.errors import UserError
from megatron_mosa.utils import counted, usable_processors


def number_of_processes(gpus: int, chosen: str) -> int:
    """Return ``chosen``, or how many of the GPUs are a power of two, by which batch sizes divide; on a CPU, 2.

    Raises:
        UserError: ``chosen`` is not a positive number, or far more than this machine has processors for.
    """
    if not chosen:
        return 2 ** (gpus.bit_length() - 1) if gpus else 2
    most = max(16, gpus, 4 * (os.cpu_count() or 1))  # each takes half a gigabyte before it trains anything
    if not chosen.isdecimal() or not int(chosen) or len(chosen) > 9:
        raise UserError(f"NPROC must be a positive number of processes, got {chosen}")
    if int(chosen) > most:
        raise UserError(f"NPROC must be at most {most} on this machine, got {chosen}")
    return int(chosen)


def main(arguments: Sequence[str]) -> int:
    """Train with a configuration and overrides; return the exit code.

    Raises:
        UserError: the environment variable NPROC is not a positive number, or what the ranks reject.
    """
    number_of_processes(0, chosen := os.environ.get("NPROC", ""))  # before torch is imported
    import torch  # as little as possible is imported before Ctrl-C is handled

    gpus = torch.cuda.device_count()
    number = number_of_processes(gpus, chosen)
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_processors() // number)))
    config, *overrides = arguments
    if number % 2:  # the user's own overrides come last, so that they win
        overrides.insert(0, "parallel.tensor_model_parallel_size=1")
    where = counted(gpus, "visible GPU") if gpus else "CPU (gloo)"
    what = f"{counted(number, 'process')} on {where}, OMP_NUM_THREADS={threads}"
    print(f"{what}: {' '.join([config, *overrides])}", flush=True)
    if number > 1:
        program = ["--module", "megatron_mosa", "pretrain", config, *overrides]
        return torchrun.main(["--standalone", "--nproc-per-node", str(number), *program])
    from megatron_mosa.commands.training import start_training

    return start_training(config, overrides)


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
