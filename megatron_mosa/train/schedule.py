"""The learning rate of a step."""

from __future__ import annotations

import math

from megatron_mosa.config import OptimizerSection


def learning_rate(step: int, total_steps: int, options: OptimizerSection) -> float:
    """Return the learning rate: linear warm-up, then a decay to ``min_learning_rate`` at the last step.

    ``cosine`` and ``linear`` decay from the end of the warm-up, ``wsd`` (warm-up, stable, decay) linearly over the last
    ``decay_fraction`` of the steps, and ``constant`` not at all. A schedule shorter than its warm-up never decays.

    Args:
        step: the step about to be taken, 1 to ``total_steps``.
        total_steps: length of the schedule, which does not depend on where a run stops.
        options: section ``optimizer`` of the configuration.
    """
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    span = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + span * _decay_factor(step, total_steps, options)


def _decay_factor(step: int, total_steps: int, options: OptimizerSection) -> float:
    """Return 1 before the decay, falling to 0 at the last step."""
    if options.schedule == "constant":
        return 1.0
    decay_starts = options.warmup_steps
    if options.schedule == "wsd":
        decay_starts = max(decay_starts, total_steps - max(1, round(options.decay_fraction * total_steps)))
    progress = min(1.0, max(0.0, (step - decay_starts) / max(1, total_steps - decay_starts)))
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if options.schedule == "cosine" else 1.0 - progress
