"""Runs of pretrain_mosa.py in one directory, on a dataset that is built once."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.distributed.pool import free_port
from tests.loaded import loaded_python, wait_for_ranks

ROOT = Path(__file__).parents[2]
TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.head_dim=8",
    "mosa.num_heads=6",
    "mosa.sparsity=8",
    "data.sequence_length=64",
    "data.vocab_size=400",
    "data.validation_fraction=0.2",
    "train.steps=10",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "optimizer.warmup_steps=1",
    "validation.interval=5",
    "validation.num_samples=6",
    "checkpoint.interval=4",
    "logging.interval=1",
]


class Runner:
    """Runs programs in one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = str(ROOT / "configs" / "quickstart.yaml")
        self.overrides = [*TINY, f"data.path={folder}/data", f"run.directory={folder}/runs"]
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def call(self, *arguments: str, python: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program to its end."""
        return subprocess.run(
            [python or loaded_python(), *arguments], cwd=self.folder, env=self.environment | variables,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def mosa(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a ``mosa`` command."""
        return self.call("-m", "megatron_mosa", *arguments)

    def launch(self, name: str, *overrides: str) -> str:
        """Run two ranks to their end under a real torchrun, without the loaded Python; return their output."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        script = [str(ROOT / "pretrain_mosa.py"), self.config, *self.overrides, f"run.name={name}", *overrides]
        done = self.call(*launcher, *script, python=sys.executable)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(
        self,
        name: str,
        *overrides: str,
        processes: int = 2,
        largest_file: int | None = None,
        module: str | None = None,
        **variables: str,
    ) -> list[subprocess.Popen[bytes]]:
        """Start the ranks of a run from the loaded Python; their output is appended to NAME.out and NAME.err.

        ``module`` takes the place of pretrain_mosa.py.
        """
        program = ["-m", module] if module else [str(ROOT / "pretrain_mosa.py")]
        script = [*program, self.config, *self.overrides, f"run.name={name}", *overrides]
        world = {"WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
        limit = (
            (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))) if largest_file else None
        )
        with (self.folder / f"{name}.out").open("a") as output, (self.folder / f"{name}.err").open("a") as errors:
            return [
                subprocess.Popen(
                    [loaded_python(), *script], cwd=self.folder, stdout=output, stderr=errors, preexec_fn=limit,
                    env=self.environment | world | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} | variables,
                )
                for rank in range(processes)
            ]  # fmt: skip

    def codes(self, name: str, *overrides: str, **options: Any) -> list[int]:
        """``start`` a run and wait for its end; return the exit codes by rank."""
        try:
            return wait_for_ranks(self.start(name, *overrides, **options))
        except TimeoutError as error:
            error.add_note(self.printed(name, "out") + self.printed(name, "err"))  # with all stacks
            raise

    def run(self, name: str, *overrides: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """``start`` a run and wait for its end; the exit code is the largest of all ranks in absolute value."""
        before = {stream: self.printed(name, stream) for stream in ("out", "err")}
        codes = self.codes(name, *overrides, **options)
        output, errors = (self.printed(name, stream)[len(before[stream]) :] for stream in before)
        return subprocess.CompletedProcess([name, *overrides], max(codes, key=abs), output, errors)

    def all_ranks(self, name: str, *overrides: str, **options: Any) -> tuple[list[int], str]:
        """``start`` a run and wait for its end; return the exit codes by rank, and what all have written to stderr."""
        codes = self.codes(name, *overrides, **options)
        return codes, self.printed(name, "err")

    def pretrain(self, name: str, *overrides: str, **options: Any) -> str:
        """``run``, which must succeed; return the standard output of all ranks."""
        done = self.run(name, *overrides, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def printed(self, name: str, stream: str) -> str:
        """Return the output of all starts of a run so far; ``stream`` is "out" or "err"."""
        path = self.folder / f"{name}.{stream}"
        return path.read_text() if path.exists() else ""

    def lines(self, name: str) -> list[dict]:
        """Return the lines of a run's metrics.jsonl."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        """Return the training losses by step."""
        lines = [line for line in self.lines(name) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    def weights(self, name: str, step: int) -> dict[str, torch.Tensor]:
        """Return all tensors of a checkpoint's state."""
        file = self.folder / f"{name}.pt"
        dcp_to_torch_save(self.folder / "runs" / name / "checkpoints" / f"step-{step:08d}" / "state", file)
        return torch.load(file, weights_only=False)


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("pretrain")
    runner = Runner(folder)
    library = Path(os.__file__).parent
    texts = [{"text": (library / name).read_text()} for name in ("ast.py", "argparse.py", "bdb.py", "calendar.py")]
    texts += [{"text": (library / name).read_text()} for name in ("cmd.py", "copy.py", "csv.py", "dis.py", "enum.py")]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps(text) + "\n" for text in texts))
    done = runner.mosa("data", "build", runner.config, *runner.overrides, f"data.sources=[{source}]")
    assert done.returncode == 0, done.stderr
    return runner
