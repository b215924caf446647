"""The time tests take: ``make test PYTEST_ARGS='-n 0 --costs'`` ends with a table of seconds and CPU seconds by file.

CPU seconds include all child processes, also servers and daemons, ended or not. Under pytest-xdist the loaded Python is
a child of the controller instead of the workers, so its children would be missing. Set MOSA_TEST_COSTS to a file to get
one line per test, too.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import pytest

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """Times in seconds: elapsed, and CPU time in user and kernel mode."""

    wall: float = 0.0
    user: float = 0.0
    system: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.user + other.user, self.system + other.system)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall - other.wall, self.user - other.user, self.system - other.system)


def current_cost() -> Cost:
    """Return the cost of this process and all its descendants since they started."""
    ticks, children = {}, defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        process = int(path.parent.name)
        children[int(fields[1])].append(process)
        # its own, and those of children that it has waited for
        ticks[process] = int(fields[11]) + int(fields[13]), int(fields[12]) + int(fields[14])
    below, user, system = [os.getpid()], 0, 0
    while below:
        process = below.pop()
        below += children[process]
        user, system = user + ticks[process][0], system + ticks[process][1]
    return Cost(time.monotonic(), user / TICKS, system / TICKS)


class Costs:
    """Records the cost of each test, including its share of fixtures, with the report of its teardown."""

    def __init__(self) -> None:
        self.before = current_cost()
        self.of_files: dict[str, Cost] = defaultdict(Cost)
        self.of_tests: dict[str, Cost] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "teardown":
            now = current_cost()
            cost, self.before = now - self.before, now
            report.cost = cost.wall, cost.user, cost.system  # type: ignore[attr-defined]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if values := getattr(report, "cost", None):
            cost = Cost(*values)
            self.of_files[report.nodeid.partition("::")[0]] += cost
            self.of_tests[report.nodeid] = cost

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.of_files:
            return
        terminalreporter.section("costs: seconds, CPU seconds, of which in the kernel")
        rows = dict(self.of_files)
        for file, cost in self.of_files.items():
            folder = str(Path(file).parent)
            rows[folder + "/"] = rows.get(folder + "/", Cost()) + cost
        rows["all"] = sum(self.of_files.values(), Cost())
        for name, cost in sorted(rows.items(), key=lambda pair: (not pair[0].endswith("/"), -pair[1].wall)):
            line = f"{cost.wall:8.1f} {cost.user + cost.system:8.1f} {cost.system:8.1f}  {name}"
            terminalreporter.line(line)
        if path := os.environ.get("MOSA_TEST_COSTS"):
            lines = [f"{c.wall:.2f} {c.user:.2f} {c.system:.2f} {name}" for name, c in self.of_tests.items()]
            Path(path).write_text("\n".join(lines) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--costs", action="store_true", help="print a table of the time each test file takes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--costs"):
        config.pluginmanager.register(Costs(), "mosa-costs")
