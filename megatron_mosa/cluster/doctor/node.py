"""Checks of ``mosa doctor`` that one process runs on its own node.

A faulty node never raises here: every fault becomes a finding. The checks import torch themselves, as a node may lack
it.
"""

from __future__ import annotations

import io
import os
import platform
import re
import resource
import shutil
import socket
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module, metadata, util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_mosa.errors import UserError
from megatron_mosa.utils import first_line

if TYPE_CHECKING:
    import torch

GIB = 2**30
MIB = 2**20
WRITE_BYTES = 64 * MIB
_MODULES = {"torch": "torch", "megatron-core": "megatron.core", "deepspeed": "deepspeed", "triton": "triton"}
_OPTIONAL = {"triton"}
_BUSY_SHARE = 0.1  # share of a GPU's memory that other processes use


@dataclass(frozen=True)
class Finding:
    """A fault, the fix, and the nodes that have it; without nodes it concerns the whole job."""

    check: str
    what: str
    fix: str
    is_bad: bool = True  # False: a warning
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


@dataclass
class Report:
    """Results of one rank; ``facts`` are JSON values: versions, sizes in GiB, speeds, times in seconds."""

    rank: int
    node: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    stage: str = ""  # the check in progress, to name it if it hangs

    def add(self, check: str, what: str, fix: str, *, is_bad: bool = True) -> None:
        """Add a finding about this node."""
        self.findings.append(Finding(check, what, fix, is_bad, (self.node,)))


def node_name() -> str:
    """Return this node's name in Slurm, by which a job can exclude it, or else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def import_quietly(name: str) -> ModuleType:
    """Import a module and discard its output, which every rank would print."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return import_module(name)


def run_check(report: Report, check: str, action: Callable[..., None], *args: Any) -> None:
    """Call ``action(report, *args)``; an unexpected exception becomes a finding."""
    report.stage = check
    try:
        action(report, *args)
    except Exception as error:
        report.add(check, f"{check}: the check failed ({first_line(error)})", "make sure that this node is healthy")


def check_versions(report: Report) -> None:
    """Import what training imports; a package that is missing or fails to import is bad unless it is optional."""
    report.facts["python"] = platform.python_version()
    has_wrong_apex = _check_apex(report)
    for name, module in _MODULES.items():
        report.facts[name] = None
        if has_wrong_apex and name in ("megatron-core", "deepspeed"):  # importing them would run its code
            with suppress(metadata.PackageNotFoundError):
                report.facts[name] = metadata.version(name)
            continue
        try:
            report.facts[name] = str(import_quietly(module).__version__)
        except Exception as error:
            is_absent = isinstance(error, ModuleNotFoundError) and (error.name or "") in (module, module.split(".")[0])
            if name in _OPTIONAL and is_absent:
                continue
            what = f"{name} is not installed" if is_absent else f"{name} cannot be imported ({first_line(error)})"
            fix = f"pip install -c constraints.txt {name}, in the environment of this node"
            report.add(name, what, fix, is_bad=name not in _OPTIONAL)
    report.facts["driver"] = driver_version()
    if report.facts["torch"] is not None:
        import torch
        from torch.cuda import nccl

        report.facts["CUDA"] = torch.version.cuda
        if torch.version.cuda is not None and torch.distributed.is_nccl_available():
            report.facts["NCCL"] = ".".join(map(str, nccl.version()))


def _check_apex(report: Report) -> bool:
    """Return whether the installed apex is not NVIDIA's."""
    report.facts["apex"] = None
    try:
        from megatron_mosa.parallel import reject_wrong_apex
    except Exception:  # torch is broken, which its own row reports
        return False
    try:
        reject_wrong_apex()
    except UserError as error:
        what, _, fix = str(error).partition("; ")
        report.add("apex", what, fix)
        return True
    if util.find_spec("apex") is not None:
        with suppress(metadata.PackageNotFoundError):
            report.facts["apex"] = metadata.version("apex")
    return False


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of the loaded NVIDIA kernel driver, or None."""
    try:
        match = re.search(r"\b\d{3,}\.\d+(\.\d+)*\b", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[0] if match else None


def check_gpus(report: Report, position: int, peers: int) -> None:
    """Measure memory and speed of this process's share of the GPUs, or the speed of the CPU if there is no GPU.

    Args:
        position: index of this process among the ``peers`` processes of its node.
    """
    import torch

    report.facts["gpus"] = []
    if not torch.cuda.is_available():
        _check_hidden_gpus(report)
        report.facts["matrix_tflops"] = [matrix_tflops(torch.device("cpu"))]
        return
    count = torch.cuda.device_count()
    # Fewer GPUs than processes: each sees only its own (srun --gpus-per-task), or some share one.
    mine = range(count) if count < peers else range(position, count, peers)
    report.facts["matrix_tflops"] = []
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        gpu: dict[str, Any] = dict(index=index, name=properties.name, uuid=str(properties.uuid))
        report.facts["gpus"].append(gpu)
        if index not in mine:
            continue
        free, total = torch.cuda.mem_get_info(index)  # bytes
        gpu.update(free_gib=free / GIB, total_gib=total / GIB)
        if free < (1 - _BUSY_SHARE) * total:
            what = f"GPU {index}: {(total - free) / GIB:.1f} of {total / GIB:.1f} GiB are used by other processes"
            report.add("GPUs", what, "nvidia-smi on that node shows which", is_bad=False)
        gpu["tflops"] = matrix_tflops(torch.device("cuda", index))
        report.facts["matrix_tflops"].append(gpu["tflops"])


def _check_hidden_gpus(report: Report) -> None:
    """Add a finding if the node has GPUs that torch does not see."""
    import torch

    has_gpus = any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None
    if not has_gpus or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # hidden on purpose
        return
    reason, fix = "this torch is built without CUDA", "install a CUDA build of torch"
    if torch.version.cuda is not None:
        fix = f"update the driver (nvidia-smi must work), or install a torch for CUDA older than {torch.version.cuda}"
        try:
            torch.cuda.init()
            reason = "torch.cuda.is_available() is false"
        except Exception as error:
            reason = first_line(error)
    report.add("GPUs", f"the node has NVIDIA GPUs, but torch sees none ({reason})", fix)


def matrix_tflops(device: torch.device, repeats: int = 7) -> float:
    """Return the median speed of a square matrix product in TFLOP/s: bf16 on a GPU, fp32 on the CPU."""
    import torch

    is_gpu = device.type == "cuda"
    size = 8192 if is_gpu else 1024
    a = torch.randn(size, size, dtype=torch.bfloat16 if is_gpu else torch.float32, device=device)
    seconds = []
    for _ in range(2 + repeats):  # the first two warm up the device
        start = time.perf_counter()
        torch.matmul(a, a)
        if is_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e12


def check_limits(report: Report) -> None:
    """Check the limit on open files, and that the node's directory for temporary files is writable."""
    report.facts["open_files"] = limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < 1024:
        report.add("open files", f"ulimit -n is {limit}", "raise it to 1024 or more (limits.conf)", is_bad=False)
    # Not gettempdir() alone, which silently falls back to another directory.
    folder = os.environ.get("TMPDIR") or tempfile.gettempdir()
    report.facts["temporary"] = folder
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        report.add("temporary folder", f"could not write to {folder} ({error.strerror})", "set TMPDIR, or clean it up")


def check_directory(report: Report, folder: Path, token: str | None, minimum_gib: float) -> None:
    """Check free space and write speed of the run directory, and that it is the one that rank 0 sees.

    Args:
        token: name of the file that rank 0 created in it; None if it could not.
    """
    is_shared = token is None or _appears(folder / token)
    report.facts["is_shared"] = is_shared
    if not is_shared:
        what = f"run directory {folder} is not shared: a file that rank 0 created in it is missing"
        report.add("run directory", what, "mount the shared file system, or give a --run-directory on it")
        return
    file = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        report.facts["free_gib"] = free = shutil.disk_usage(folder).free / GIB
        report.facts["write_mib_s"] = write_speed(file)
    except OSError as error:
        what = f"could not write to run directory {folder} ({error.strerror})"
        report.add("run directory", what, "check its permissions and mount, or choose another --run-directory")
        return
    finally:
        with suppress(OSError):
            file.unlink()
    if free < minimum_gib:
        what = f"run directory {folder} has {free:.0f} GiB free, but needs {minimum_gib:g}"
        report.add("free space", what, "free some space, or lower --minimum-disk")


def write_speed(file: Path) -> float:
    """Write and fsync a new file; return the speed in MiB/s."""
    block = os.urandom(MIB)  # compressible data would flatter the file system
    start = time.perf_counter()
    with file.open("xb") as stream:
        for _ in range(WRITE_BYTES // MIB):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    return WRITE_BYTES / MIB / (time.perf_counter() - start)


def _appears(file: Path, seconds: float = 3.0) -> bool:
    """Return whether a file appears within ``seconds``: network file systems may show it late."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
