# ``python``: sends its arguments, environment and streams to the server, forwards signals, and exits as the child does.
# LoadedPython writes the first lines, with the server's address.
import array
import os
import resource
import signal
import socket
import sys
from contextlib import suppress

PASSED_ON = {getattr(signal, f"SIG{name}") for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "CONT")}


def pass_on(child: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended, and its exit code is about to arrive
        os.kill(child, number)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is a child
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(ADDRESS)  # type: ignore[name-defined]  # noqa: F821
        umask = os.umask(0)
        os.umask(umask)
        start = {
            "arguments": sys.argv[1:],
            "environment": dict(os.environ),
            "folder": os.getcwd(),
            "umask": umask,
            "largest_file": resource.getrlimit(resource.RLIMIT_FSIZE),
        }
        streams = array.array("i", [0, 1, 2])
        server.sendmsg([b"\n"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        server.sendall(repr(start).encode() + b"\n")  # importing json takes as long as all the rest
        answers = server.makefile()
        child = int(answers.readline() or 0)
        if file := os.environ.get("LOADED_PYTHON_CHILD"):  # for tests that kill the program itself
            with open(file, "w") as output:
                print(child, file=output)
        if child:
            for number in PASSED_ON:
                signal.signal(number, lambda number, frame: pass_on(child, number))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        end = answers.readline()
    if not end:  # the server has ended, and with it the child
        os.kill(os.getpid(), signal.SIGKILL)
    code = int(end)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
