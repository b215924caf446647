"""Multi-node launchers without Slurm, on two "nodes" of this machine, and usage errors of all launch/ scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.pool import free_port
from tests.loaded import first_on_path, loaded_python

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
TINY = ["model.num_layers=1", "model.hidden_size=16", "model.head_dim=8", "mosa.num_heads=2", "mosa.sparsity=8"]
TINY += ["data.sequence_length=32", "data.vocab_size=300", "data.validation_fraction=0.3", "data.num_workers=0"]
TINY += ["train.steps=2", "train.micro_batch_size=2", "train.global_batch_size=4", "optimizer.warmup_steps=1"]
TINY += ["validation.interval=2", "validation.num_samples=2", "logging.interval=1", "logging.tensorboard=false"]


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build a small dataset; return the overrides that use it."""
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "texts").mkdir()
    for name in ("cmd.py", "copy.py", "csv.py", "dis.py"):
        (folder / "texts" / f"{name}.txt").write_text((Path(os.__file__).parent / name).read_text())
    chosen = [*TINY, f"data.path={folder}/data", f"run.directory={folder}/runs"]
    sources = f"data.sources=[{folder}/texts]"
    subprocess.run([loaded_python(), "-m", "megatron_mosa", "data", "build", CONFIG, *chosen, sources], check=True)
    return chosen


@contextmanager
def started(command: list[str], **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run the program of one node."""
    environment = os.environ | {"PATH": first_on_path(), "VIRTUAL_ENV": sys.prefix} | variables
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, text=True, **streams) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_nodes_without_ssh(overrides: list[str], launcher: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two names of one machine\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    common |= {"NNODES": "2", "NPROC": "1"} if launcher == "torchrun" else {"HOSTFILE": f"{tmp_path}/hosts"}
    command = [str(ROOT / "launch" / launcher / "multi_node.sh"), CONFIG, *overrides, f"run.name={launcher}"]
    with started(command, NODE_RANK="0", **common) as first, started(command, NODE_RANK="1", **common) as second:
        outputs = [process.communicate(timeout=280)[0] for process in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0), "\n".join(outputs)
    (directory,) = (word.partition("=")[2] for word in overrides if word.startswith("run.directory="))
    lines = [json.loads(line) for line in (Path(directory) / launcher / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "line"),
    [
        ("torchrun/local.sh", [], {}, "usage: "),
        ("torchrun/local.sh", ["c.yaml"], {"NPROC": "x"}, "error: NPROC must be a positive number of processes, got x"),
        ("torchrun/local.sh", [CONFIG, "data.path=/none"], {"NPROC": "1"}, "error: data.path=/none does not exist"),
        ("torchrun/local.sh", [CONFIG, "data.path=/none"], {"NPROC": "2"}, "error: data.path=/none does not exist"),
        ("torchrun/multi_node.sh", [], {"NNODES": "2", "MASTER_ADDR": "a"}, "usage: "),
        ("torchrun/multi_node.sh", ["c.yaml"], {"NNODES": "2"}, "usage: "),
        (
            "torchrun/multi_node.sh",
            ["c.yaml"],
            {"NNODES": "x", "MASTER_ADDR": "a", "NPROC": "1"},
            "error: NNODES must be 1 to 999999999, without leading zeros, got x",
        ),
        *(
            (
                "torchrun/multi_node.sh",
                ["c.yaml"],
                {"NNODES": number, "MASTER_ADDR": "a", "NPROC": "1"},
                f"error: NNODES must be 1 to 999999999, without leading zeros, got {number}",
            )
            for number in ("08", "1=1", str(2**64 + 1))
        ),
        (
            "torchrun/multi_node.sh",
            ["c.yaml"],
            {"NNODES": "2", "MASTER_ADDR": "a", "NPROC": "1", "MASTER_PORT": "99999"},
            "error: MASTER_PORT must be at most 65535, got 99999",
        ),
        (
            "torchrun/multi_node.sh",
            ["c.yaml"],
            {"NNODES": "2", "MASTER_ADDR": "a", "NPROC": "1", "MAX_RESTARTS": "x"},
            "error: MAX_RESTARTS must be a number, got x",
        ),
        (
            "torchrun/multi_node.sh",
            ["c.yaml"],
            {"NNODES": "2", "MASTER_ADDR": "a b", "NPROC": "1"},
            "error: MASTER_ADDR must be a name or address, got 'a b'",
        ),
        ("deepspeed/multi_node.sh", ["c.yaml"], {}, "usage: "),
        ("deepspeed/multi_node.sh", ["c.yaml"], {"HOSTFILE": "/none"}, "error: HOSTFILE=/none cannot be read"),
        ("deepspeed/multi_node.sh", ["c.yaml"], {"HOSTFILE": "BAD"}, "error: HOSTFILE="),
        (
            "deepspeed/multi_node.sh",
            ["c.yaml"],
            {"HOSTFILE": "GOOD", "NODE_RANK": "2"},
            "error: NODE_RANK must be 0 to 1",
        ),
        *(
            ("deepspeed/multi_node.sh", ["c.yaml"], {"HOSTFILE": "GOOD", "NODE_RANK": rank}, "error: NODE_RANK must be")
            for rank in ("08", str(2**64))
        ),
        ("deepspeed/multi_node.sh", ["c.yaml"], {"HOSTFILE": "GOOD", "NODE_RANK": "0"}, "error: "),
        ("slurm/pretrain.sbatch", [], {}, "usage: "),
        ("slurm/pretrain.sbatch", ["c.yaml"], {}, "error: not in a Slurm job"),
    ],
)
def test_usage_errors(script: str, arguments: list[str], variables: dict[str, str], line: str, tmp_path: Path) -> None:
    (tmp_path / "BAD").write_text("node1 slots=2\nnode2\n")
    (tmp_path / "GOOD").write_text("node1 slots=2\n\n# comment\nnode2 slots=1\n")
    if variables.get("HOSTFILE") in ("BAD", "GOOD"):
        variables = variables | {"HOSTFILE": f"{tmp_path}/{variables['HOSTFILE']}"}
    ours = ("SLURM_", "NNODES", "NPROC", "MASTER_", "HOSTFILE", "NODE_RANK")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | variables
    environment |= {"PATH": first_on_path(), "VIRTUAL_ENV": sys.prefix, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(line)


def test_a_meeting_that_fails_is_one_line(tmp_path: Path) -> None:
    """torchrun itself would exit with 1 after a page of its frames."""
    command = [sys.executable, "-m", "megatron_mosa.cluster.torchrun", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:99999", "rank.py"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("error: torchrun could not start the ranks: The port number")
    assert done.stderr.count("\n") == 1, done.stderr


def _under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    ("number", "code", "nohup"),
    [(signal.SIGTERM, 143, True), (signal.SIGINT, 130, True), (signal.SIGHUP, 129, False)],
)
def test_torchrun_ends_with_the_code_of_its_signal(
    number: signal.Signals, code: int, nohup: bool, tmp_path: Path
) -> None:
    """While the ranks import, they have nothing to save; torchrun itself would exit with 1 after a traceback.

    Under nohup the end of the terminal ends nothing; torchrun itself would end the ranks.
    """
    (tmp_path / "rank.py").write_text(
        "import pathlib, signal, time\nsignal.signal(2, signal.SIG_DFL)\npathlib.Path('up').touch()\ntime.sleep(60)\n"
    )
    command = [
        sys.executable,
        "-m",
        "megatron_mosa.cluster.torchrun",
        "--standalone",
        "--nproc-per-node",
        "1",
        "rank.py",
    ]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=_under_nohup if nohup else None,
    ) as process:  # fmt: skip
        while process.poll() is None and not (tmp_path / "up").exists():
            time.sleep(0.1)
        if nohup:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.5)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "death signal" not in errors and "torch/distributed" not in errors, errors
