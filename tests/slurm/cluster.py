"""A real Slurm cluster of two nodes on loopback, in a private directory: one munged, one slurmctld, two slurmd.

Nothing in /etc is read or written; ``SLURM_CONF`` points the client programs to the cluster. Only processes started
here are ended: each daemon by its id, and the descendants of a slurmd by their parent ids.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODES = ("n1", "n2")

# Slurm's timeouts are minutes by default; here a requeue takes seconds. proctrack/linuxproc and no cgroup.conf, so that
# it runs in a container. A requeued job waits for cred_expire and one more second.
CONFIGURATION = """
ClusterName=mosa
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=5
BatchStartTimeout=10
MessageTimeout=5
CompleteWait=0
InactiveLimit=0
ReturnToService=2
JobRequeue=1
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Return the programs of Slurm and munge that are missing from PATH and the sbin directories."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """A running cluster, until ``stop``; ``environment`` is for client programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment["PATH"] += ":/usr/sbin:/sbin"
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        self._configure()
        try:
            self._start_munged()
            self._start("slurmctld", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
            for node in NODES:
                self.start_node(node)
            self.wait_for_nodes()
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        # The ranks' port follows from the job id, and another suite on this machine has jobs, too.
        first_job = 50 * random.randrange(1, 200)
        text = CONFIGURATION.format(
            host=host, controller_port=ports[0], user=getpass.getuser(), folder=self.folder, nodes=nodes,
            first_job=first_job,
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text)

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)  # munged rejects a socket that others cannot reach
        files = {name: f"{self.folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
        command = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={files['socket']}"]
        command += [f"--pid-file={files['pid']}", f"--log-file={files['log']}", f"--seed-file={files['seed']}"]
        self._start("munged", command)
        self.wait(lambda: Path(files["socket"]).exists(), 10, "munged's socket")

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("adopt.py")), *command], env=self.environment,
                stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True, cwd=self.folder,
            )  # fmt: skip

    def start_node(self, node: str) -> None:
        """Start a node's slurmd; a node that was killed rejoins under its name."""
        self._start(node, ["slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node])

    def processes_of(self, node: str) -> list[psutil.Process]:
        """Return a node's slurmd, first, and its descendants: step daemons, the batch script and tasks."""
        try:
            return psutil.Process(self.daemons[node].pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill_node(self, node: str) -> None:
        """Kill all processes of a node at once, like a power failure."""
        processes = self.processes_of(node)
        for process in processes:  # suspended first, so that none reacts to the death of another
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.daemons[node].wait(10)

    def stop(self) -> None:
        """End everything that was started, and wait for it."""
        for node in NODES:
            if node in self.daemons:
                self.kill_node(node)
        for name in ("slurmctld", "munged"):
            if name in self.daemons:
                self.daemons[name].communicate(timeout=20)  # closes standard input, which ends it

    def call(self, *command: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a client program."""
        return subprocess.run(
            command, env=self.environment | variables, cwd=self.folder, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of ``scontrol show job``."""
        done = self.call("scontrol", "show", "job", "-o", job_id)
        return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))

    def wait(self, condition, seconds: float, what: str) -> None:
        """Wait until ``condition`` holds.

        Raises:
            TimeoutError: it does not hold within ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} after {seconds} s; logs in {self.folder}")
            time.sleep(0.1)

    def wait_for_nodes(self) -> None:
        """Wait until both nodes accept jobs."""
        ready = lambda: self.call("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"]  # noqa: E731
        self.wait(ready, 30, "idle nodes")

    def wait_for_job(self, job_id: str, seconds: float = 480) -> dict[str, str]:
        """Wait until a job has ended for good; return its fields."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait(lambda: self.job(job_id).get("JobState") in final, seconds, f"end of job {job_id}")
        return self.job(job_id)


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
