"""Which rank of a run has failed first, and so says why."""

from __future__ import annotations

import json
import re
import threading
import time
from contextlib import suppress

from torch import distributed as dist

HEAD_START_SECONDS = 0.5
LAST_SECONDS = 3.0
LOST_CONNECTION = re.compile(r"[Cc]onnection|Read error|remote process|remote worker")
"""In errors of collectives."""

_FIRST, _FAILED = "first", "failed"


class FirstFailure:
    """Finds the rank that has failed first, by the store that all ranks share.

    Errors of one rank alone make others fail, too, once they miss it; other errors are the same on all ranks. In both
    cases one line is enough.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        """
        Args:
            store: from ``join_store``.
            rank: this process's rank.
            world_size: number of ranks.
        """
        self._store = dist.PrefixStore("failures", store)
        self.rank = rank
        self._world_size = world_size

    def claim(self, reason: str) -> bool:
        """Return whether no other rank has failed before this one; True, too, if the store has gone.

        Call it before this rank's process groups are destroyed, which the others notice. If all ranks fail at about the
        same time, rank 0 is the first: its log is the one that people read.

        Args:
            reason: why this rank fails, in one line.
        """
        found = [True]

        def ask() -> None:
            with suppress(dist.DistError, RuntimeError):  # rank 0 has ended, and the store with it
                if self.rank != 0:
                    self._wait_for_another()
                mine = json.dumps([self.rank, reason])
                found[0] = self._store.compare_set(_FIRST, "", mine).decode() == mine
                self._store.add(_FAILED, 1)

        thread = threading.Thread(target=ask, daemon=True)  # a node that has gone is noticed late
        thread.start()
        thread.join(LAST_SECONDS)
        return found[0]

    def another(self) -> str | None:
        """Return why another rank has failed before this one, if one has."""
        with suppress(dist.DistError, RuntimeError):
            if self._store.check([_FIRST]):
                rank, reason = json.loads(self._store.get(_FIRST))
                return None if rank == self.rank else reason
        return None

    def wait_for_the_others(self) -> None:
        """Keep the store, if it is rank 0's, for a moment, until all ranks that fail alike have asked it."""
        deadline = time.monotonic() + LAST_SECONDS
        with suppress(dist.DistError, RuntimeError):
            while self.rank == 0 and self._store.add(_FAILED, 0) < self._world_size and time.monotonic() < deadline:
                time.sleep(0.02)

    def _wait_for_another(self) -> None:
        deadline = time.monotonic() + HEAD_START_SECONDS
        while not self._store.check([_FIRST]) and time.monotonic() < deadline:
            time.sleep(0.02)


def is_lost_connection(error: Exception) -> bool:
    """Return whether ``error`` is what a collective raises when another rank has gone."""
    text = str(error)
    is_of_a_backend = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return is_of_a_backend and bool(LOST_CONNECTION.search(text))
