"""Megatron's groups in one process, for tests that need a model but no parallelism."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_mosa.parallel import Layout, destroy_parallel, initialize_parallel


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """The layout of a world size of one."""
    yield initialize_parallel(1, seed=1)
    destroy_parallel()
