"""Losses that jump out of their recent past."""

from __future__ import annotations

import statistics
from collections import deque


class SpikeDetector:
    """Compares each loss with the mean and the standard deviation of those before it."""

    def __init__(self, sigmas: float, window: int) -> None:
        """
        Args:
            sigmas: standard deviations above the mean from which on a loss is a spike.
            window: how many losses before it are looked at; until there are as many, there are no spikes.
        """
        self.sigmas = sigmas
        self._recent = deque[float](maxlen=window)

    def excess(self, loss: float) -> float | None:
        """Standard deviations of a spike above the mean; None: no spike. A spike is not added to the past."""
        if len(self._recent) == self._recent.maxlen:
            deviation = statistics.pstdev(self._recent)
            above = loss - statistics.fmean(self._recent)
            if deviation > 0 and above > self.sigmas * deviation:
                return above / deviation
        self._recent.append(loss)
        return None
