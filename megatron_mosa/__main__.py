"""Run ``mosa``: the console command, and ``python -m megatron_mosa``."""

import sys

from megatron_mosa.entry import raise_gc_threshold, run


def main() -> None:
    """Run ``mosa`` and exit with 0 (success), 1 (failure), 2 (usage error) or 130 (interrupted)."""

    def command_line() -> None:
        from megatron_mosa.cli import app  # here, so that Ctrl-C during its imports ends in one line, too

        app()

    raise_gc_threshold()
    sys.exit(run(command_line))


if __name__ == "__main__":
    main()
