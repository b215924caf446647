"""The training loop and what surrounds it."""

from megatron_mosa.train.pretrain import pretrain
from megatron_mosa.train.start import ResumePoint, check_start

__all__ = ["ResumePoint", "check_start", "pretrain"]
