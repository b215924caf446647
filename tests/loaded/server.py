"""``server.py SOCKET PROGRAM ROOM``: imports everything, then forks a child for each client that connects.

A child whose client has died is killed, as the client would have been. When standard input ends, so do all children.
"""

from __future__ import annotations

import array
import ast
import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import io
import os
import pkgutil
import resource
import runpy
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
import warnings
import weakref
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Libraries that the package imports late, and modules that they import at first use.
LIBRARIES = (
    "datasets",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "transformers",
)


def load() -> None:
    """Import all that any of the programs imports. No thread may be running, because threads do not survive a fork."""
    import megatron_mosa
    from tests.loaded.gloo import share_device

    for library in LIBRARIES:
        importlib.import_module(library)
    for module in pkgutil.walk_packages(megatron_mosa.__path__, "megatron_mosa."):
        if not module.name.endswith(("__main__", "hybrid_model")):  # the latter needs Megatron-core 0.19
            importlib.import_module(module.name)
    share_device()
    prepare_commands()
    keep_libraries()
    gc.collect()
    gc.freeze()  # so that children keep sharing these pages
    assert threading.active_count() == 1  # threads of native libraries handle forks themselves


def prepare_commands() -> None:
    """Let all children share Typer's table of commands and options, which takes as long as most commands that fail."""
    import typer.main

    from megatron_mosa.cli import app

    typer.main.get_command = cache(typer.main.get_command)
    typer.main.get_command(app)


def keep_libraries() -> None:
    """Let children end without removing torch's custom ops one by one, which takes longer than many a command."""
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        if (known := finalizer.peek()) and getattr(known[1], "__module__", "") == "torch.library":
            finalizer.atexit = False


@dataclass
class Client:
    """A connection with its received bytes and streams, and the child that was forked for it."""

    connection: socket.socket
    received: bytes = b""
    streams: list[int] = field(default_factory=list)
    child: int = 0


class Server:
    """Serves until ``stop`` is readable, which means that it was closed."""

    def __init__(self, listener: socket.socket, program: str, stop: Any) -> None:
        self.listener = listener
        self.program = program
        self.clients: dict[int, Client] = {}  # by file descriptor of the connection
        self.selector = selectors.DefaultSelector()
        self.ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.own = [listener.fileno(), self.ended, wake]
        for readable in (listener, self.ended, stop):
            self.selector.register(readable, selectors.EVENT_READ)
        self.stop = stop
        self.process = os.getpid()

    def serve(self) -> None:
        """Serve until standard input ends."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.stop:
                    return self.kill_all()
                if key.fileobj is self.listener:
                    connection, _ = self.listener.accept()
                    self.clients[connection.fileno()] = Client(connection)
                    self.selector.register(connection, selectors.EVENT_READ)
                elif key.fileobj == self.ended:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.ended, 4096)
                    self.report_exits()
                elif client := self.clients.get(key.fd):
                    try:
                        self.hear(client)
                    except OSError:  # the client was killed
                        self.forget(client)

    def hear(self, client: Client) -> None:
        """Receive a part of a request; at the end of it, fork. If the client is gone, forget it."""
        data, ancillary, _, _ = client.connection.recvmsg(1 << 16, socket.CMSG_SPACE(3 * 4))
        for _, _, content in ancillary:
            client.streams += array.array("i", content)
        if not data:
            return self.forget(client)
        client.received += data
        if client.received.count(b"\n") == 2:  # the first one came with the streams
            job = ast.literal_eval(client.received.decode().strip())
            client.child = os.fork()
            if client.child == 0:
                self.become(job, client.streams)
            for stream in client.streams:
                os.close(stream)
            client.streams = []
            client.connection.sendall(f"{client.child}\n".encode())

    def report_exits(self) -> None:
        """Send the exit codes of all children that have ended."""
        by_child = {client.child: client for client in self.clients.values()}
        while True:
            try:
                child, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if child == 0:
                return
            if client := by_child.get(child):
                client.child = 0
                with contextlib.suppress(BrokenPipeError):
                    client.connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                self.forget(client)

    def forget(self, client: Client) -> None:
        kill(client.child)
        self.selector.unregister(client.connection)
        del self.clients[client.connection.fileno()]
        client.connection.close()

    def kill_all(self) -> None:
        for client in self.clients.values():
            kill(client.child)

    def become(self, job: dict, streams: list[int]) -> NoReturn:
        """Run the program of the command line, in the child. Does not return."""
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.process:  # the server ended before prctl
            os._exit(1)
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for descriptor in (*self.own, *self.clients, *(stream for stream in streams if stream > 2)):
            os.close(descriptor)
        self.selector.close()
        os._exit(run(job, self.program))


def kill(child: int) -> None:
    """Kill a child and all processes it has started."""
    if child:
        with contextlib.suppress(ProcessLookupError):  # it has not called setsid yet
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)


def show_command(words: list[str]) -> None:
    """Make ``ps`` show the program's command line, in the memory of the server's last argument, which is long."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    first, last = int(fields[45]), int(fields[46])
    text = os.fsencode("\0".join(words))[: last - first - 1]
    ctypes.memmove(first, text.ljust(last - first, b"\0"), last - first)


def run(job: dict, program: str) -> int:
    """Run the program to its end; return its exit code."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    os.umask(job["umask"])
    resource.setrlimit(resource.RLIMIT_FSIZE, job["largest_file"])
    sys.stdin, sys.stdout = (io.TextIOWrapper(os.fdopen(n, mode, closefd=False)) for n, mode in ((0, "rb"), (1, "wb")))
    errors = os.fdopen(2, "wb", closefd=False)
    sys.stderr = io.TextIOWrapper(errors, errors="backslashreplace", line_buffering=True)
    faulthandler.register(signal.SIGQUIT, file=2)  # see show_stacks
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    show_command([program, *job["arguments"]])
    code = 1
    try:
        code = exit_code(lambda: execute(job["arguments"], program))
        # As the interpreter does at its end.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    return code


def execute(arguments: list[str], program: str) -> None:
    """Interpret Python's command line: options, ``-c CODE``, ``-m MODULE`` or a file, and the program's arguments."""
    sys.executable = program
    sys.orig_argv = [program, *arguments]
    words = iter(["-u", *arguments] if os.environ.get("PYTHONUNBUFFERED") else arguments)
    safe_path = False
    for word in words:
        if word == "-u":
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0, closefd=False), write_through=True)
        elif word == "-P":
            safe_path = True
        elif word == "-W":
            warnings.simplefilter(next(words))  # type: ignore[arg-type]
        else:
            break
    else:
        raise SystemExit("the loaded Python cannot read a program from standard input")
    added = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[1:1] = added
    sys.path[0] = os.getcwd() if word in ("-c", "-m") else str(Path(word).resolve().parent)
    if safe_path:
        del sys.path[0]
    for path in added:  # as site.py does
        if (file := Path(path, "sitecustomize.py")).is_file():
            runpy.run_path(str(file))
    if word == "-c":
        code = next(words)
        sys.argv = ["-c", *words]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif word == "-m":
        module = next(words)
        sys.argv = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [word, *words]
        runpy.run_path(word, run_name="__main__")


def exit_code(program: Any) -> int:
    """Run the program; return the exit code that the interpreter would have."""
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def main() -> None:
    """Import everything, open the socket and serve."""
    address, program, _ = sys.argv[1:]
    try:
        load()
    except BaseException:
        shutil.rmtree(Path(address).parent)  # so that nobody keeps waiting for it
        raise
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(128)
        os.rename(f"{address}.new", address)  # clients wait for this name
        Server(listener, program, sys.stdin).serve()


if __name__ == "__main__":
    main()
