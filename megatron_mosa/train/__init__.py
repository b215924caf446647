"""The training loop, its callbacks, and the start and end of a run."""

from megatron_mosa.train.callbacks.progress import Progress
from megatron_mosa.train.callbacks.survival import Heartbeat, StepMonitor
from megatron_mosa.train.pretrain import pretrain
from megatron_mosa.train.sample import sample_text
from megatron_mosa.train.schedule import learning_rate
from megatron_mosa.train.start import ResumePoint, build_index, check_start, training_samples
from megatron_mosa.train.trainer import Callback, Trainer, TrainingState
from megatron_mosa.train.writers import Writers

__all__ = [
    "Callback",
    "Heartbeat",
    "Progress",
    "ResumePoint",
    "StepMonitor",
    "Trainer",
    "TrainingState",
    "Writers",
    "build_index",
    "check_start",
    "learning_rate",
    "pretrain",
    "sample_text",
    "training_samples",
]
