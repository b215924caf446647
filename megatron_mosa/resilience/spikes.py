"""Detection of loss spikes."""

from __future__ import annotations

import statistics
from collections import deque


class SpikeDetector:
    """Compares each loss with the mean and standard deviation of the losses before it."""

    def __init__(self, sigmas: float, window: int) -> None:
        """
        Args:
            sigmas: standard deviations above the mean beyond which a loss is a spike.
            window: number of preceding losses to compare with; until there are that many, nothing is a spike.
        """
        self.sigmas = sigmas
        self._recent = deque[float](maxlen=window)

    def excess(self, loss: float) -> float | None:
        """Return a spike's distance from the mean in standard deviations, or None; spikes do not enter the window."""
        if len(self._recent) == self._recent.maxlen:
            deviation = statistics.pstdev(self._recent)
            above = loss - statistics.fmean(self._recent)
            if deviation > 0 and above > self.sigmas * deviation:
                return above / deviation
        self._recent.append(loss)
        return None
