"""Tasks for worker processes: agreement on a stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Any

from torch import distributed as dist

from megatron_mosa.engine import Batch, StepResult
from megatron_mosa.parallel import HostGroup, Layout, on_every_rank, on_main_rank
from megatron_mosa.resilience.faults import FaultInjection
from megatron_mosa.resilience.interruption import SIGNALS, Interruption, Signals
from megatron_mosa.resilience.peers import PeerMonitor
from megatron_mosa.resilience.services import ResilienceServices
from megatron_mosa.resilience.status import RunStatus
from megatron_mosa.resilience.watchdog import Watchdog
from megatron_mosa.train.trainer import Trainer, TrainingState
from tests.distributed.tasks import parallel, tiny_config


class _Engine:
    """A fake engine whose third step produces a reason to stop."""

    accumulation_steps = 1

    def __init__(self, interruption: Interruption, reason: str | None) -> None:
        self.interruption = interruption
        self.reason = reason
        self.steps = 0

    def train_step(self, batches: Iterable[Batch], learning_rate: float) -> StepResult:
        self.steps += 1
        if self.steps == 3 and self.reason == "deadline":
            self.interruption.deadline = time.time() - 1
        elif self.steps == 3 and self.reason is not None:
            os.kill(os.getpid(), signal.Signals[self.reason])
            while not self.interruption.signals.received:
                time.sleep(0.001)  # until the reader thread records it
        return StepResult(loss=1.0, grad_norm=1.0)


def heard(failing: int) -> list[str]:
    """Return what this rank hears of a bug on one rank, in an action for all ranks and in one on every rank."""

    def fail() -> None:
        if dist.get_rank() == failing:
            raise ValueError("a bug")

    told = []
    with parallel(tiny_config()):
        for action in (on_main_rank, on_every_rank):
            try:
                action(fail)
            except Exception as error:
                told.append(f"{type(error).__name__}: {error}")
    return told


def stopped(folder: Path, reasons: dict[int, str]) -> tuple[int, str | None]:
    """Return the step after which a 6-step run stops, and why; ``reasons`` by rank occur in the third step."""
    config = tiny_config(train__steps=6)
    with parallel(config) as layout:
        before = {number: signal.getsignal(number) for number in SIGNALS}
        signals = Signals()
        signals.listen()
        interruption = Interruption(signals, None)
        interruption.hosts = HostGroup()
        try:
            trainer = _trainer(config, layout, folder, interruption, reasons.get(layout.rank))
            trainer.run(repeat({}))
        finally:
            signals.close()
            for number, handler in before.items():
                signal.signal(number, handler)
    return trainer.state.step, trainer.stop_reason


def _trainer(config: Any, layout: Layout, folder: Path, interruption: Interruption, reason: str | None) -> Trainer:
    services = ResilienceServices(
        interruption,
        Watchdog(folder, layout.rank, 0, lambda: None),
        RunStatus(folder, is_main=False),
        FaultInjection(config.fault_injection, folder, layout.rank),
        PeerMonitor(lambda rank: None),
    )
    engine: Any = _Engine(interruption, reason)
    return Trainer(config, engine, layout, TrainingState(), [], services)
