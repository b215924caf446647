"""The training loop, its callbacks, and the start and end of a run."""

from megatron_mosa.train.pretrain import pretrain
from megatron_mosa.train.start import ResumePoint, check_start

__all__ = ["ResumePoint", "check_start", "pretrain"]
