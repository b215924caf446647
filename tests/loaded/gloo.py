"""One polling thread for all gloo groups of a process.

torch gives each group its own device, whose thread wakes up every 10 ms, with or without traffic. Megatron-core creates
50 groups or more per tensor-parallel size, so that a few waiting ranks used a quarter of a machine with two cores.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

from torch import distributed
from torch.distributed import ProcessGroupGloo, distributed_c10d


@cache
def _device() -> Any:
    return ProcessGroupGloo.create_default_device()


class _OfOneDevice(ProcessGroupGloo):
    def __init__(self, store: distributed.Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = [_device()]
        options._timeout = timeout
        super().__init__(store, rank, size, options)


def share_device() -> None:
    """Use one device for all groups that this process creates from now on, and one in each of its children."""
    distributed_c10d.ProcessGroupGloo = _OfOneDevice  # type: ignore[misc]
