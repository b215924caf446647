"""One pool of processes per world size, for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import WorkerPools


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPools]:
    """On the CPU."""
    pools = WorkerPools()
    yield pools
    pools.close()
