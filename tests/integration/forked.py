"""The other end of fork_server.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.distributed.pool import free_port

ROOT = Path(__file__).parents[2]


class ForkedRuns:
    """Runs of pretrain_mosa.py, started by a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.integration.fork_server"], cwd=folder, text=True,
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        while self._answer() != "ready":  # libraries print when they are imported
            pass

    def start(self, arguments: list[str], processes: int, output: Path, errors: Path) -> list[int]:
        """Their ids; what they print is added to the two files."""
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        printed = [str(output), str(errors)]
        job = dict(arguments=arguments, processes=processes, environment=environment, printed=printed)
        assert self.server.stdin is not None
        print(json.dumps(job), file=self.server.stdin, flush=True)
        return [int(word) for word in self._answer().split()]

    def exit_codes(self) -> list[int]:
        """Of the run that was started last, when it has ended."""
        return [int(word) for word in self._answer().split()]

    def _answer(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the server ended"
        return line.strip()

    def close(self) -> None:
        """End the server."""
        self.server.terminate()
        self.server.wait()
