"""Training engines behind one small protocol."""

import os

import torch

if not torch.cuda.is_available():
    # Set before DeepSpeed is imported, this avoids its search for accelerators and a warning on every rank.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from megatron_mosa.engine.deepspeed_engine import DeepSpeedEngine
from megatron_mosa.engine.protocol import Batch, StepResult, TrainingEngine

__all__ = ["Batch", "DeepSpeedEngine", "StepResult", "TrainingEngine"]
