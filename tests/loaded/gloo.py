"""One thread that polls for all of a process's gloo groups.

torch gives each group a device of its own, whose thread wakes up every 10 ms whether there is traffic or not.
Megatron-core makes 50 groups and more for a tensor-parallel size, and a few ranks that only wait took a quarter of a
machine with two cores. The groups stay as they are.
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
    """For all groups that this process and its children make from now on; each process has a device of its own."""
    distributed_c10d.ProcessGroupGloo = _OfOneDevice  # type: ignore[misc]
