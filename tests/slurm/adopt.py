"""``adopt.py COMMAND...``: runs a daemon, adopts all that it leaves behind, and ends when the last of them has.

A slurmd forks its step daemons twice, so that their parent is process 1. Below this program they keep a parent by
which a test finds those of one node.
"""

import ctypes
import os
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
    sys.exit(f"no subreaper: {os.strerror(ctypes.get_errno())}")
subprocess.Popen(sys.argv[1:])
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
