"""Resilience services of one process: signals, deadline, watchdog, status and fault injection."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mosa.config import Config
from megatron_mosa.exit_codes import FAILED, HUNG
from megatron_mosa.resilience.deadline import job_end
from megatron_mosa.resilience.faults import FaultInjection
from megatron_mosa.resilience.interruption import Interruption, Signals
from megatron_mosa.resilience.peers import PeerMonitor
from megatron_mosa.resilience.status import RunStatus
from megatron_mosa.resilience.watchdog import Watchdog

if TYPE_CHECKING:
    from megatron_mosa.parallel import HostGroup, Layout

STACKS = "stacks"
PEER_GRACE_SECONDS = 15.0
"""From another rank's death to the end of this one: time for an error that says more, and for a watchdog that fires on
all ranks, to end the process with their own exit codes."""


@dataclass(frozen=True)
class ResilienceServices:
    """Resilience services of one process, from its start to its end."""

    interruption: Interruption
    watchdog: Watchdog
    status: RunStatus
    faults: FaultInjection
    peers: PeerMonitor

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

        def end_with(dead: int) -> None:
            reason = f"rank {dead} has died while rank {rank} was {watchdog.doing}"
            watchdog.end_process(reason, FAILED, PEER_GRACE_SECONDS, lambda: status.end(FAILED, reason))

        return cls(Interruption(signals, deadline), watchdog, status, faults, PeerMonitor(end_with))

    def join(self, layout: Layout, hosts: HostGroup) -> None:
        """Agree with the other ranks on stops from now on, and end if one of them dies. A collective over ``hosts``."""
        self.interruption.hosts = hosts
        self.peers.connect(layout.rank, layout.world_size, hosts)

    def end(self) -> None:
        """Stop the watchdog and restore the signal handlers."""
        self.watchdog.close()
        self.interruption.signals.close()
