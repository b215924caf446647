"""What ``mosa doctor`` finds out about the node of one process, without the others.

Nothing here raises for what is wrong with a node: it becomes a finding. Torch is imported inside the checks, as a node
may lack it.
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

if TYPE_CHECKING:
    import torch

GIB = 2**30
MIB = 2**20
WRITE_BYTES = 64 * MIB
_MODULES = {"torch": "torch", "megatron-core": "megatron.core", "deepspeed": "deepspeed", "triton": "triton"}
_OPTIONAL = {"triton"}
_BUSY_SHARE = 0.1  # of a GPU's memory in others' use


@dataclass(frozen=True)
class Finding:
    """What is wrong, on which nodes, and what to do; with no nodes it is the job's, and no node's fault."""

    check: str
    what: str
    fix: str
    is_bad: bool = True  # or a warning
    nodes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


@dataclass
class Report:
    """What one rank found; ``facts`` holds what JSON can: versions, sizes in GiB, speeds, times in seconds."""

    rank: int
    node: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    stage: str = ""  # what it is at, for whoever waits for it

    def add(self, check: str, what: str, fix: str, *, is_bad: bool = True) -> None:
        """Add a finding about this node."""
        self.findings.append(Finding(check, what, fix, is_bad, (self.node,)))


def node_name() -> str:
    """Slurm's name of this node, by which a job can exclude it; else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def parallel_module(name: str) -> ModuleType:
    """A module of ``megatron_mosa.parallel`` by its file: the package around it needs a sound Megatron-core."""
    path = Path(__file__).parents[1] / "parallel" / f"{name}.py"
    spec = util.spec_from_file_location(f"_doctor_{name}", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_quietly(name: str) -> ModuleType:
    """Import a module; what it prints meanwhile is dropped, as every rank would print it."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return import_module(name)


def run_check(report: Report, check: str, action: Callable[..., None], *args: Any) -> None:
    """Call ``action(report, *args)``; what it fails with in a way not thought of becomes a finding."""
    report.stage = check
    try:
        action(report, *args)
    except Exception as error:
        report.add(check, f"{check}: the check failed ({_first_line(error)})", "see that this node is sound")


def check_versions(report: Report) -> None:
    """Import what training imports; what lacks or fails is bad, but for optional packages."""
    report.facts["python"] = platform.python_version()
    has_wrong_apex = _check_apex(report)
    for name, module in _MODULES.items():
        report.facts[name] = None
        if has_wrong_apex and name in ("megatron-core", "deepspeed"):  # they would run its code
            with suppress(metadata.PackageNotFoundError):
                report.facts[name] = metadata.version(name)
            continue
        try:
            report.facts[name] = str(import_quietly(module).__version__)
        except Exception as error:
            is_absent = isinstance(error, ModuleNotFoundError) and (error.name or "") in (module, module.split(".")[0])
            if name in _OPTIONAL and is_absent:
                continue
            what = f"{name} is not installed" if is_absent else f"{name} cannot be imported ({_first_line(error)})"
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
    """Whether what goes by the name apex is not NVIDIA's."""
    report.facts["apex"] = None
    try:
        apex = parallel_module("apex")
    except Exception:  # torch, whose own row says so
        return False
    try:
        apex.refuse_wrong_apex()
    except UserError as error:
        what, _, fix = str(error).partition("; ")
        report.add("apex", what, fix)
        return True
    if util.find_spec("apex") is not None:
        with suppress(metadata.PackageNotFoundError):
            report.facts["apex"] = metadata.version("apex")
    return False


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA kernel driver, if one is loaded."""
    try:
        match = re.search(r"\b\d{3,}\.\d+(\.\d+)*\b", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[0] if match else None


def check_gpus(report: Report, position: int, peers: int) -> None:
    """Memory and speed of this process's share of the GPUs; without a GPU the speed of the CPU.

    Args:
        position: of this process among the ``peers`` of its node.
    """
    import torch

    report.facts["gpus"] = []
    if not torch.cuda.is_available():
        _check_hidden_gpus(report)
        report.facts["matrix_tflops"] = [matrix_tflops(torch.device("cpu"))]
        return
    count = torch.cuda.device_count()
    # Fewer than processes: each sees its own alone (srun --gpus-per-task), or some share one.
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
            what = f"GPU {index}: {(total - free) / GIB:.1f} of {total / GIB:.1f} GiB are in others' use"
            report.add("GPUs", what, "nvidia-smi on that node shows whose", is_bad=False)
        gpu["tflops"] = matrix_tflops(torch.device("cuda", index))
        report.facts["matrix_tflops"].append(gpu["tflops"])


def _check_hidden_gpus(report: Report) -> None:
    """Find GPUs that torch does not see."""
    import torch

    has_gpus = any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None
    if not has_gpus or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # or are hidden on purpose
        return
    reason, fix = "this torch is built without CUDA", "install a CUDA build of torch"
    if torch.version.cuda is not None:
        fix = f"update its driver (nvidia-smi must work), or install a torch for CUDA older than {torch.version.cuda}"
        try:
            torch.cuda.init()
            reason = "torch.cuda.is_available() is false"
        except Exception as error:
            reason = _first_line(error)
    report.add("GPUs", f"the node has NVIDIA GPUs, but torch sees none ({reason})", fix)


def matrix_tflops(device: torch.device, repeats: int = 7) -> float:
    """Speed of a square matrix product in TFLOP/s, median of several: bf16 on a GPU, fp32 on the CPU."""
    import torch

    is_gpu = device.type == "cuda"
    size = 8192 if is_gpu else 1024
    a = torch.randn(size, size, dtype=torch.bfloat16 if is_gpu else torch.float32, device=device)
    seconds = []
    for _ in range(2 + repeats):  # the first two wake the device up
        start = time.perf_counter()
        torch.matmul(a, a)
        if is_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e12


def check_limits(report: Report) -> None:
    """Open files and the node's own folder for temporary files."""
    report.facts["open_files"] = limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < 1024:
        report.add("open files", f"ulimit -n is {limit}", "raise it to 1024 or more (limits.conf)", is_bad=False)
    # Not gettempdir() alone, which goes elsewhere in silence.
    folder = os.environ.get("TMPDIR") or tempfile.gettempdir()
    report.facts["temporary"] = folder
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        report.add("temporary folder", f"{folder} cannot be written ({error.strerror})", "set TMPDIR, or clean it up")


def check_directory(report: Report, folder: Path, token: str | None, minimum_gib: float) -> None:
    """Free space and write speed of the run directory, and whether it is the one that rank 0 sees.

    Args:
        token: name of the file that rank 0 has made in it, if it could.
    """
    is_shared = token is None or _appears(folder / token)
    report.facts["is_shared"] = is_shared
    if not is_shared:
        what = f"run directory {folder} is not shared: a file that rank 0 made in it is not there"
        report.add("run directory", what, "mount the shared file system, or name a --run-directory that lies on it")
        return
    file = folder / f".doctor-{uuid.uuid4().hex}"
    try:
        report.facts["free_gib"] = free = shutil.disk_usage(folder).free / GIB
        report.facts["write_mib_s"] = write_speed(file)
    except OSError as error:
        what = f"run directory {folder} cannot be written ({error.strerror})"
        report.add("run directory", what, "see to its permissions and mount, or choose another --run-directory")
        return
    finally:
        with suppress(OSError):
            file.unlink()
    if free < minimum_gib:
        what = f"run directory {folder} has {free:.0f} GiB free of the {minimum_gib:g} that it needs"
        report.add("free space", what, "make room, or lower --minimum-disk")


def write_speed(file: Path) -> float:
    """Write a new file until it is on the disk; return MiB/s."""
    block = os.urandom(MIB)  # what compresses would flatter the file system
    start = time.perf_counter()
    with file.open("xb") as stream:
        for _ in range(WRITE_BYTES // MIB):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    return WRITE_BYTES / MIB / (time.perf_counter() - start)


def _appears(file: Path, seconds: float = 3.0) -> bool:
    """Whether a file is there; network file systems may show it a little late."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
