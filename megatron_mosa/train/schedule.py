"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math

from megatron_mosa.config.schema import OptimizerSection


def learning_rate(step: int, total_steps: int, options: OptimizerSection) -> float:
    """Linear warm-up, then a cosine from ``learning_rate`` down to ``min_learning_rate`` at the last step.

    A schedule that is no longer than its warm-up ends on the way up.

    Args:
        step: the step about to be taken, 1 to ``total_steps``.
        total_steps: length of the schedule, whatever the step at which a run stops.
        options: section ``optimizer`` of the configuration.
    """
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, total_steps - options.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return options.min_learning_rate + (options.learning_rate - options.min_learning_rate) * cosine
