"""The training loop and what surrounds it."""

from megatron_mosa.train.pretrain import check_start, pretrain, run_directory

__all__ = ["check_start", "pretrain", "run_directory"]
