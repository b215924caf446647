"""Pretrain a MoSA language model: ``pretrain_mosa.py CONFIG.yaml [section.key=value ...]``.

Runs under python, torchrun, srun and deepspeed; launch/torchrun/local.sh starts it on one machine.
"""

from __future__ import annotations

import argparse
import sys

from megatron_mosa.config import check_world_size, load_config
from megatron_mosa.entry import gc_disabled_during_imports, run
from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import DONE
from megatron_mosa.resilience.interruption import block_sigusr1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a MoSA language model.")
    parser.add_argument("config", help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that override the file's")
    parser.add_argument("--check-only", action="store_true", help="check the configuration, layout and data, then exit")
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="with --check-only: number of processes to check for; default 1"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    return parser.parse_intermixed_args()


def main() -> int:
    """Check the configuration and, without --check-only, train; return the exit code."""
    arguments = parse_arguments()
    if arguments.world_size is not None and (arguments.world_size < 1 or not arguments.check_only):
        raise UserError(f"--world-size must be at least 1 and needs --check-only, got {arguments.world_size}")
    config = load_config(arguments.config, arguments.overrides, checks_batches=False)  # pretrain checks them
    if arguments.check_only:
        check_world_size(config, arguments.world_size or 1)
    else:
        block_sigusr1()
    with gc_disabled_during_imports():
        from megatron_mosa.train import check_start, pretrain  # slow to import, so mistakes are reported first

    if arguments.check_only:
        check_start(config, arguments.world_size or 1)
        return DONE
    return pretrain(config)


if __name__ == "__main__":
    sys.exit(run(main))
