"""Kills one rank of a sweep as the kernel does when memory runs out."""

from __future__ import annotations

from pathlib import Path

# Imported at the start of every Python whose PYTHONPATH has it. Workers that are started again are left alone.
_CODE = """
import os, sys, threading, time

def has_begun():
    return os.path.exists(progress) and EVENT in open(progress).read()

def kill():
    while not has_begun():
        time.sleep(0.01)
    os.kill(os.getpid(), 9)

session, rank = sys.orig_argv[-1], os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
progress = session.replace(".json", ".progress")
if session.endswith(".json") and "megatron_mosa.tools.scaling.sweep_worker" in sys.orig_argv:
    if rank == "1" and not has_begun():
        threading.Thread(target=kill, daemon=True).start()
"""


def write_killer(folder: Path, cell: str) -> Path:
    """Return a directory for PYTHONPATH with which rank 1 dies while it builds a cell, by the cell's name."""
    folder.mkdir()
    event = f'"{cell}", "phase": "building"'
    (folder / "sitecustomize.py").write_text(_CODE.replace("EVENT", repr(event)))
    return folder
