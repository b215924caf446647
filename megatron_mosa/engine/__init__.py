"""Training engines behind one small protocol."""

import os

import torch

if not torch.cuda.is_available():
    # Said before its import, this spares DeepSpeed a search for accelerators and a warning on every rank.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from megatron_mosa.engine.deepspeed_engine import DeepSpeedEngine
from megatron_mosa.engine.protocol import Batch, StepResult, TrainingEngine

__all__ = ["Batch", "DeepSpeedEngine", "StepResult", "TrainingEngine"]
