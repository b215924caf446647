"""With MOSA_REQUIRE_ALL=1 a skipped test outside tests/gpu fails the session, so that CI cannot miss any.

And one pool of processes per world size, for the whole session.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.pool import WorkerPools

GPU_TESTS = Path(__file__).parent / "gpu"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which Megatron-core may do first


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def launcher_variables() -> Iterator[None]:
    """What a run in this process sets for DeepSpeed is not left to the programs that later tests start."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPools]:
    """On the CPU."""
    pools = WorkerPools()
    yield pools
    pools.close()


class RequireAll:
    """Collects skipped tests and turns a passing session with such a test into a failed one."""

    def __init__(self, config: pytest.Config) -> None:
        self.root = config.rootpath
        self.skipped: list[str] = []

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        expected_failure = hasattr(report, "wasxfail")  # pytest reports an xfail as skipped
        path = self.root / report.nodeid.partition("::")[0]
        if report.skipped and not expected_failure and not path.is_relative_to(GPU_TESTS):
            self.skipped.append(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.note(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.skipped and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.section("skipped, but MOSA_REQUIRE_ALL=1", red=True)
            for nodeid in self.skipped:
                terminalreporter.line(nodeid)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("MOSA_REQUIRE_ALL") == "1":
        config.pluginmanager.register(RequireAll(config), "require-all")
