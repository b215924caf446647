"""Pretrain a MoSA language model: ``pretrain_mosa.py CONFIG.yaml [section.key=value ...]``.

Runs under python, torchrun, srun and deepspeed; launch/torchrun/local.sh starts it on one machine.
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from megatron_mosa.entry import run
from megatron_mosa.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reports a mistake as every other one: in one line."""

    def error(self, message: str) -> NoReturn:
        message = message.replace("config, section.key=value", "config")  # argparse names optional arguments, too
        raise UserError(f"{message}; see pretrain_mosa.py --help")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description="Pretrain a MoSA language model.")
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
    from megatron_mosa.commands.training import start_training  # here, so that Ctrl-C during imports ends in one line

    arguments = parse_arguments()
    return start_training(
        arguments.config, arguments.overrides, check_only=arguments.check_only, world_size=arguments.world_size
    )


if __name__ == "__main__":
    sys.exit(run(main))
