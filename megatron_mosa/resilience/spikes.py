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
        self._recent = deque[tuple[int, float]](maxlen=window)

    def excess(self, step: int, loss: float) -> float | None:
        """Return a spike's distance from the mean in standard deviations, or None; spikes do not enter the window.

        A step that is not after the last one repeats steps after a rewind, whose losses leave the window.
        """
        while self._recent and self._recent[-1][0] >= step:
            self._recent.pop()
        if len(self._recent) == self._recent.maxlen:
            losses = [loss for _, loss in self._recent]
            deviation = statistics.pstdev(losses)
            above = loss - statistics.fmean(losses)
            if deviation > 0 and above > self.sigmas * deviation:
                return above / deviation
        self._recent.append((step, loss))
        return None
