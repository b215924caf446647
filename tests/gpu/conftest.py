"""Tests that need a GPU; without one they are reported as not run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import WorkerPools
from tests.unit.conftest import layout

__all__ = ["layout"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here, and skip them without CUDA."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPools]:
    """Pools on the GPU: one process, or several that share it."""
    pools = WorkerPools(on_gpu=True)
    yield pools
    pools.close()
