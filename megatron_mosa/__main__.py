"""Run ``mosa`` as ``python -m megatron_mosa``."""

from megatron_mosa.cli import main

main()
