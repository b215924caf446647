"""Fixtures and scheduling of all tests.

With MOSA_REQUIRE_ALL=1 a skipped test outside tests/gpu fails the session, so that CI cannot miss any.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pool import WorkerPools
from tests.interpreter import speed_up
from tests.loaded import loaded_python, restore_executable, share

pytest_plugins = ["tests.costs"]

GPU_TESTS = Path(__file__).parent / "gpu"
# Run first, because they take longest.
FIRST = (
    "tests/slurm/",
    "tests/distributed/test_parity.py",
    "tests/integration/test_pretrain.py",
    "tests/kernels/test_triton_compiles.py",
    "tests/kernels/",
)
# Each of these directories runs on one worker, because its tests share slow fixtures.
TOGETHER = ("tests/slurm/", "tests/conversion/")
# Each of these tests may run on another worker, where there is a GPU: they wait for compilers, and share no fixtures.
SPREAD = ("tests/gpu/test_acceleration.py", "tests/gpu/test_kernels.py", "tests/gpu/test_triton.py")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script; tests send SIGINT to programs
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which Megatron-core may do
    speed_up()

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _launcher_variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in LAUNCHER}


def _restore(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


AT_START = _launcher_variables()


@pytest.fixture(autouse=True, scope="module")
def module_launcher_variables() -> None:
    """Restore the launcher's variables, so that a module's fixtures choose a new port: the old one may be taken."""
    _restore(AT_START)


@pytest.fixture(autouse=True)
def launcher_variables() -> Iterator[None]:
    """Undo what a run in this process sets for DeepSpeed, so that programs that later tests start do not inherit it."""
    before = _launcher_variables()
    yield
    _restore(before)


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPools]:
    """Pools of processes on the CPU."""
    pools = WorkerPools()
    yield pools
    pools.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute tests to the workers of ``-n`` by file, and some directories as a whole."""
    from xdist.scheduler import LoadFileScheduling

    class Schedule(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(SPREAD) and torch.cuda.is_available():
                return nodeid
            return next((path for path in TOGETHER if nodeid.startswith(path)), super()._split_scope(nodeid))

    config.option.loadscopereorder = False  # keep the order of pytest_collection_modifyitems
    return Schedule(config, log)


class RequireAll:
    """Turns a passing session with skipped tests into a failed one."""

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the summary of tests/slurm.

    It is in this file because the process that prints it under ``-n`` reads no other conftest.py.
    """
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    reports = [r for r in reports if isinstance(r, pytest.TestReport) and r.nodeid.startswith("tests/slurm/")]
    if skipped := [report.longrepr for report in reports if report.skipped]:
        terminalreporter.section("NOT RUN: the tests of Slurm jobs", yellow=True)
        terminalreporter.line(skipped[0][-1].removeprefix("Skipped: "))  # type: ignore[index, union-attr]
    if times := [pair for report in reports if report.when == "teardown" for pair in report.user_properties]:
        terminalreporter.section("faults in Slurm jobs: seconds to the end of the attempt, to the next new step")
        for name, (ended, recovered) in times:  # type: ignore[misc]
            terminalreporter.line(f"{name:20} {ended:6.1f} {recovered:6.1f}")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        restore_executable()
    elif config.getoption("numprocesses", None):
        config.add_cleanup(share().close)
        if not torch.cuda.is_available():  # the loaded Python has no GPU
            config.option.tx = [f"popen//python={loaded_python()}"] * len(config.option.tx)
    if os.environ.get("MOSA_REQUIRE_ALL") == "1":
        config.pluginmanager.register(RequireAll(config), "require-all")
