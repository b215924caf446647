"""``adopt.py COMMAND...``: runs a daemon, adopts its orphaned descendants, and exits when the last of them has.

A slurmd forks its step daemons twice, so that their parent would be process 1. Under this program they keep a parent by
which a test finds those of one node. When standard input closes, which it does when the tests end, it ends all of them.
"""

import ctypes
import os
import subprocess
import sys
import threading
from contextlib import suppress

import psutil

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def end_with_the_tests() -> None:
    os.read(0, 1)  # blocks until standard input closes
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(0)


if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
    sys.exit(f"no subreaper: {os.strerror(ctypes.get_errno())}")
subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=end_with_the_tests, daemon=True).start()
while True:
    try:
        os.wait()
    except ChildProcessError:
        os._exit(0)  # do not wait for the thread
