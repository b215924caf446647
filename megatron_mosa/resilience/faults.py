"""Fault injection, to test what a run survives (section ``fault_injection``)."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mosa.config import FaultInjectionSection

if TYPE_CHECKING:
    from torch import Tensor

_SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "SIGTERM": signal.SIGTERM,
    "SIGUSR1": signal.SIGUSR1,
}
DATA_FAULTS = ("nan", "garbage")
"""Faults that change what a run computes."""


class FaultInjection:
    """Injects the configured fault: on one rank, at one place in one step, once per run directory."""

    def __init__(
        self,
        section: FaultInjectionSection,
        directory: Path,
        rank: int,
        is_asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            section: the fault to inject.
            directory: the run directory.
            rank: this process's rank.
            is_asked_to_stop: ends a pause early once it returns True.
        """
        self.section = section
        self._done = directory / "fault_injected"
        self._rank = rank
        self._is_asked_to_stop = is_asked_to_stop

    def inject(self, place: str, step: int) -> None:
        """Inject the fault if place and step match."""
        fault = self.section.fault
        if fault is None or fault in DATA_FAULTS or not self._is_here(place, step):
            return
        self._record()
        if fault == "error":
            raise RuntimeError("injected by fault_injection.fault=error")
        if fault == "pause":
            end = time.monotonic() + self.section.seconds
            while time.monotonic() < end and not self._is_asked_to_stop():
                time.sleep(0.05)
            return
        os.kill(os.getpid(), _SIGNALS[fault])

    def with_data_fault(
        self, batches: Iterator[dict[str, Tensor]], steps_taken: int, batches_per_step: int
    ) -> Iterator[dict[str, Tensor]]:
        """Return the micro-batches after step ``steps_taken``; a due fault gives them NaN masks or garbage labels."""
        if self.section.fault not in DATA_FAULTS:
            return batches
        return self._with_data_fault(batches, steps_taken, batches_per_step)

    def _with_data_fault(
        self, batches: Iterator[dict[str, Tensor]], steps_taken: int, batches_per_step: int
    ) -> Iterator[dict[str, Tensor]]:
        is_here = False
        for number, batch in enumerate(batches):
            if number % batches_per_step == 0:
                is_here = self._is_here("step", steps_taken + 1 + number // batches_per_step)
                if is_here:
                    self._record()
            if is_here:
                if self.section.fault == "nan":
                    batch = batch | {"loss_mask": batch["loss_mask"] * float("nan")}
                else:
                    batch = batch | {"labels": batch["labels"] * 0}
            yield batch

    def _is_here(self, place: str, step: int) -> bool:
        configured = (self.section.place, self.section.step, self.section.rank)
        return configured == (place, step, self._rank) and not self._done.exists()

    def _record(self) -> None:
        self._done.touch()
        print(f"rank {self._rank}: fault_injection.fault={self.section.fault}", file=sys.stderr, flush=True)
