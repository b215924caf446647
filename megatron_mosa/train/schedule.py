"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math

from megatron_mosa.config import OptimizerSection


def learning_rate(step: int, total_steps: int, options: OptimizerSection) -> float:
    """Linear warm-up to ``learning_rate``, then by ``schedule`` down to ``min_learning_rate`` at the last step.

    ``cosine`` and ``linear`` decay from the end of the warm-up, ``constant`` never, ``wsd`` (warm-up, stable, decay)
    linearly over the last ``decay_fraction`` of the steps. A schedule no longer than its warm-up ends on the way up.

    Args:
        step: the step about to be taken, 1 to ``total_steps``.
        total_steps: length of the schedule, whatever the step at which a run stops.
        options: section ``optimizer`` of the configuration.
    """
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    span = options.learning_rate - options.min_learning_rate
    return options.min_learning_rate + span * _height(step, total_steps, options)


def _height(step: int, total_steps: int, options: OptimizerSection) -> float:
    """1 at the top, 0 at the last step of a schedule that decays."""
    if options.schedule == "constant":
        return 1.0
    decay_starts = options.warmup_steps
    if options.schedule == "wsd":
        decay_starts = max(decay_starts, total_steps - round(options.decay_fraction * total_steps))
    progress = min(1.0, max(0.0, (step - decay_starts) / max(1, total_steps - decay_starts)))
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if options.schedule == "cosine" else 1.0 - progress
