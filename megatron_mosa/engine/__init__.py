"""Training engines behind one small protocol."""

from megatron_mosa.engine.deepspeed_engine import DeepSpeedEngine
from megatron_mosa.engine.protocol import Batch, StepResult, TrainingEngine

__all__ = ["Batch", "DeepSpeedEngine", "StepResult", "TrainingEngine"]
