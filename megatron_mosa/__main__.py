"""Run ``mosa``: the console command, and ``python -m megatron_mosa``."""

import sys

from megatron_mosa.entry import raise_gc_threshold, run


def main() -> None:
    """Run ``mosa`` and exit with 0 (success), 1 (failure), 2 (usage error) or 130 (interrupted)."""

    def program() -> object:
        from megatron_mosa.cli import command_line  # here, so that Ctrl-C during its imports ends in one line, too

        return command_line()

    raise_gc_threshold()
    sys.exit(run(program))


if __name__ == "__main__":
    main()
