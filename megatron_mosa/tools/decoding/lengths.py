"""The tokens that a measurement of decoding reads, known without importing anything slow."""

from __future__ import annotations

STEPS = 32
"""Of each of two repetitions, by default."""


def tokens_needed(context: int, steps: int = STEPS) -> int:
    """Return how many tokens a split must have: the context, warm-up and two repetitions, and one more as a label."""
    return context + 3 * steps + 1
