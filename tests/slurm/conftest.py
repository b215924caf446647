"""One Slurm cluster and one tiny dataset for all tests here; without Slurm they are reported as not run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.loaded import first_on_path, loaded_python
from tests.slurm.cluster import Cluster, missing_programs

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "slurm" / "pretrain.sbatch")
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
TINY = [
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.head_dim=8",
    "mosa.num_heads=2",
    "mosa.sparsity=8",
    "data.sequence_length=32",
    "data.vocab_size=300",
    "data.validation_fraction=0.2",
    "data.num_workers=0",
    "train.steps=4",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "optimizer.warmup_steps=2",
    "validation.interval=4",
    "validation.num_samples=2",
    "checkpoint.interval=2",
    "logging.interval=1",
    "logging.tensorboard=false",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("slurm")
            item.add_marker(pytest.mark.timeout(900))


TIMES: dict[str, tuple[float, float]] = {}
"""Seconds from each fault until its attempt ended, and until the next attempt published a new step."""


@pytest.fixture(autouse=True)
def recovery_times(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Attach the times to the test's result, for the summary in tests/conftest.py."""
    yield
    while TIMES:
        record_property(*TIMES.popitem())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, n1 and n2, on loopback."""
    if missing := missing_programs():
        pytest.skip(f"Slurm is not installed ({', '.join(missing)} missing): make test SLURM=install")
    if os.geteuid() != 0:
        pytest.skip("the tests run slurmctld and slurmd only as root")
    folder = Path(
        tempfile.mkdtemp(prefix="mosa-slurm-")
    )  # a short path: that of munge's socket is limited to 107 characters
    cluster = Cluster(folder)
    yield cluster
    cluster.stop()
    shutil.rmtree(folder)


@dataclass
class Jobs:
    """Submits jobs from one directory."""

    cluster: Cluster
    folder: Path
    overrides: list[str]

    def environment(self, **variables: str) -> dict[str, str]:
        """Return the environment of jobs, in addition to the client's."""
        path = first_on_path(self.cluster.environment["PATH"])
        common = {"MOSA_ROOT": str(ROOT), "PYTHONPATH": str(ROOT), "PATH": path, "GLOO_SOCKET_IFNAME": "lo"}
        common["VIRTUAL_ENV"] = sys.prefix  # or the batch script would put the repository's first
        fast = {"MOSA_BACKOFF_SECONDS": "0.2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        below_torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # must not reach the ranks
        return common | fast | below_torchrun | {"MOSA_PREFLIGHT": "0"} | variables

    def submit(self, name: str, *options: str, overrides: tuple[str, ...] = (), **variables: str) -> str:
        """Submit by hand, as docs/slurm.md describes; return the job id."""
        arguments = [CONFIG, *self.overrides, f"run.name={name}", *overrides]
        command = ["sbatch", "--parsable", f"--output={self.folder}/{name}.out", *options, SCRIPT, *arguments]
        done = self.cluster.call(*command, **self.environment(**variables))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def output(self, name: str) -> str:
        """Return the output of the batch script."""
        return (self.folder / f"{name}.out").read_text()

    def run(self, name: str) -> Path:
        """Return the run directory."""
        return self.folder / "runs" / name

    def steps(self, name: str) -> list[int]:
        """Return the training steps in the journal."""
        lines = [json.loads(line) for line in (self.run(name) / "metrics.jsonl").read_text().splitlines()]
        return [line["step"] for line in lines if "loss" in line]

    def losses(self, name: str) -> list[float]:
        """Return the training and validation losses in the journal."""
        lines = [json.loads(line) for line in (self.run(name) / "metrics.jsonl").read_text().splitlines()]
        return [line.get("loss", line.get("validation_loss")) for line in lines]

    def explain(self, name: str) -> str:
        """Return all logs of a run, for a failed assertion."""
        logs = sorted(self.run(name).glob("logs/*/*.log"))
        return self.output(name) + "".join(f"\n== {log}\n{log.read_text()[-3000:]}" for log in logs)


@pytest.fixture(scope="session")
def jobs(cluster: Cluster) -> Jobs:
    """Jobs without a dataset, for programs that stand in for training."""
    folder = cluster.folder / "work"
    folder.mkdir()
    return Jobs(cluster, folder, [*TINY, f"data.path={folder}/data", f"run.directory={folder}/runs"])


@pytest.fixture(scope="session")
def training(jobs: Jobs) -> Jobs:
    """Jobs with a tiny dataset."""
    library = Path(os.__file__).parent
    texts = [{"text": (library / name).read_text()} for name in ("cmd.py", "copy.py", "csv.py", "dis.py", "enum.py")]
    source = jobs.folder / "texts.jsonl"
    source.write_text("".join(json.dumps(text) + "\n" for text in texts))
    command = [loaded_python(), "-m", "megatron_mosa", "data", "build", CONFIG, *jobs.overrides]
    command.append(f"data.sources=[{source}]")
    done = subprocess.run(command, env=os.environ | jobs.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return jobs
