"""``python -m megatron_mosa`` is ``mosa``."""

from megatron_mosa.cli import main

main()
