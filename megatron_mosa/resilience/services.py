"""Resilience services of one process: signals, deadline, watchdog, status and fault injection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_mosa.config import Config
from megatron_mosa.exit_codes import HUNG
from megatron_mosa.resilience.deadline import job_end
from megatron_mosa.resilience.faults import FaultInjection
from megatron_mosa.resilience.interruption import Interruption, Signals
from megatron_mosa.resilience.status import RunStatus
from megatron_mosa.resilience.watchdog import Watchdog

STACKS = "stacks"


@dataclass(frozen=True)
class ResilienceServices:
    """Resilience services of one process, from its start to its end."""

    interruption: Interruption
    watchdog: Watchdog
    status: RunStatus
    faults: FaultInjection

    @classmethod
    def begin(cls, config: Config, directory: Path, rank: int) -> ResilienceServices:
        """Install the signal handlers and start the watchdog; in the main thread, before the rendezvous."""
        section = config.resilience
        signals = Signals()
        signals.listen()
        end = job_end() if rank == 0 else None
        deadline = None if end is None else end - section.stop_before_limit
        status = RunStatus(directory, is_main=rank == 0)
        watchdog = Watchdog(
            directory / STACKS, rank, section.hang_timeout, lambda: status.end(HUNG, f"rank {rank}: no progress")
        )
        watchdog.start()
        faults = FaultInjection(config.fault_injection, directory, rank, lambda: bool(signals.received))
        return cls(Interruption(signals, deadline), watchdog, status, faults)

    def end(self) -> None:
        """Stop the watchdog and restore the signal handlers."""
        self.watchdog.close()
        self.interruption.signals.close()
