"""A stand-in for ``python`` that has everything imported and forks, so that a start takes 0.1 s instead of 10 s.

``server.py`` imports the package and its libraries once and forks a child for each start; ``client.py`` is the program
``python`` that tests use in place of the interpreter. To the caller it behaves like any process: arguments,
environment, working directory, streams, exit code, and signals in both directions, including ``kill -9``. Tests that
depend on a real start (what is imported, how long it takes, what happens during imports) use ``sys.executable``.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
SHARED, REAL = "MOSA_LOADED_PYTHON", "MOSA_REAL_PYTHON"
SOCKET = "socket"


class LoadedPython:
    """The server, which ends with this process, however that ends, together with all processes it has forked."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mosa-python-"))  # a socket's path has at most 107 bytes
        address = self.folder / SOCKET
        # -I and -S: without site-packages the client starts in 10 ms
        code = f"#!{Path(sys.executable).resolve()} -IS\nADDRESS = {str(address)!r}\n"
        self.program = self.folder / "python"
        self.program.write_text(code + Path(__file__).with_name("client.py").read_text())
        self.program.chmod(0o755)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        environment["TRITON_INTERPRET"] = "1"  # as tests/conftest.py
        environment["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # read when torch is imported; ``mosa doctor`` sets it before that
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.loaded.server", str(address), str(self.program), "-" * 2000],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def close(self) -> None:
        """End the server and all its children."""
        self.server.communicate(timeout=60)  # closes its standard input, which ends it
        shutil.rmtree(self.folder, ignore_errors=True)


def share() -> LoadedPython:
    """Start the server for this process and all processes it starts from now on, such as pytest-xdist's workers."""
    python = LoadedPython()
    os.environ |= {SHARED: str(python.program), REAL: sys.executable}
    return python


def restore_executable() -> None:
    """Restore ``sys.executable`` in a worker of pytest-xdist, which the server has forked."""
    sys.executable = os.environ[REAL]


@cache
def loaded_python() -> str:
    """Return the path of a program to use in place of ``sys.executable``, once everything is loaded."""
    if not (path := os.environ.get(SHARED)):
        python = LoadedPython()
        atexit.register(python.close)
        path = str(python.program)
    socket, deadline = Path(path).with_name(SOCKET), time.monotonic() + 240
    while not socket.exists():
        if time.monotonic() > deadline or not socket.parent.exists():
            raise RuntimeError("the loaded Python did not start; its error is printed above")
        time.sleep(0.05)
    return path


def first_on_path(path: str | None = None) -> str:
    """Return a value of PATH for which ``python`` is the loaded one."""
    return f"{Path(loaded_python()).parent}:{path or os.environ['PATH']}"


def show_stacks(arguments: list[str]) -> None:
    """Have all processes of a program, its loaders included, write their stacks to their standard error."""
    command = " ".join(arguments)
    for process in psutil.process_iter(["cmdline"]):
        shown = " ".join(process.info["cmdline"] or ()).rstrip()
        if shown and command.startswith(shown):  # it is cut where it is long
            with suppress(psutil.Error):
                process.send_signal(signal.SIGQUIT)
                time.sleep(0.5)  # one after the other


def wait_for_ranks(ranks: list[subprocess.Popen[bytes]], seconds: float = 240) -> list[int]:
    """Return the exit codes of a run's ranks. If one fails, terminate the others, as torchrun does."""
    deadline, are_asked = time.monotonic() + seconds, False
    try:
        while running := [rank for rank in ranks if rank.poll() is None]:
            if not are_asked and any(rank.poll() for rank in ranks):
                are_asked = True
                for rank in running:
                    rank.terminate()
            with suppress(subprocess.TimeoutExpired):
                running[0].wait(0.1)
            if time.monotonic() > deadline:
                show_stacks(ranks[0].args)
                raise TimeoutError(f"{ranks[0].args} did not end within {seconds} s")
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.wait() for rank in ranks]
