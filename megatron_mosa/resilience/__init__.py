"""Resilience services of a run: signals, time limit, watchdog, status file, loss spikes and injected faults."""

from megatron_mosa.resilience.deadline import job_end
from megatron_mosa.resilience.faults import DATA_FAULTS, FaultInjection
from megatron_mosa.resilience.interruption import block_sigusr1
from megatron_mosa.resilience.services import ResilienceServices
from megatron_mosa.resilience.spikes import SpikeDetector
from megatron_mosa.resilience.status import RUNNING, STATUS, read_status

__all__ = [
    "DATA_FAULTS",
    "RUNNING",
    "STATUS",
    "FaultInjection",
    "ResilienceServices",
    "SpikeDetector",
    "block_sigusr1",
    "job_end",
    "read_status",
]
