"""The training loop and what surrounds it."""

from megatron_mosa.train.pretrain import pretrain
from megatron_mosa.train.start import Start, check_start

__all__ = ["Start", "check_start", "pretrain"]
