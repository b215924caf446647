"""The training loop, its callbacks, and the start and end of a run."""

from typing import TYPE_CHECKING

from megatron_mosa.utils import lazy_face

if TYPE_CHECKING:
    from megatron_mosa.train.callbacks.monitoring import Heartbeat, StepMonitor
    from megatron_mosa.train.callbacks.progress import Progress
    from megatron_mosa.train.plan import describe, refuse_impossible
    from megatron_mosa.train.run import pretrain
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
    "describe",
    "learning_rate",
    "pretrain",
    "refuse_impossible",
    "sample_text",
    "training_samples",
]

__getattr__, __dir__ = lazy_face(__name__, __file__)
