"""Submitting a run to Slurm: what was asked for lies in the run directory, and the job starts from there."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_mosa.config import Config, check_world_size, save_config
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.utils.versions import versions

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path("launch", "slurm", "pretrain.sbatch")
_OPTIONS_GO_HERE = "# -- mosa submit puts its options here\n"
_PACKAGES = ("torch", "megatron-core", "deepspeed", "triton", "numpy")


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm."""

    nodes: int
    tasks_per_node: int
    options: tuple[str, ...]
    """Further options of sbatch, such as ``--time=24:00:00``."""

    chain: int = 1
    """Jobs to submit, each of which begins when the one before it has ended."""


@dataclass(frozen=True)
class Submission:
    """A job script and where it lies; nothing is written or submitted yet."""

    config: Config
    request: Request
    folder: Path
    command: str
    """The words of ``mosa submit``, to be repeated."""

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder.parents[1]

    @property
    def script(self) -> str:
        """The batch script with this job's options and its configuration.

        Raises:
            UserError: the package was installed without the repository around it.
        """
        try:
            head, mark, rest = (ROOT / TEMPLATE).read_text(encoding="utf-8").partition(_OPTIONS_GO_HERE)
        except OSError as error:
            raise UserError(
                f"no {TEMPLATE} in '{ROOT}' ({error.strerror}); mosa submit needs the repository: pip install -e it"
            ) from None
        assert mark, f"{TEMPLATE} has lost the line {_OPTIONS_GO_HERE!r}"
        options = [
            f"--job-name={self.config.run.name}",
            f"--nodes={self.request.nodes}",
            f"--ntasks-per-node={self.request.tasks_per_node}",
            f"--chdir={Path.cwd()}",  # paths in the configuration may be relative
            f"--output={self.run / 'logs' / 'slurm-%j.out'}",
            *self.request.options,
        ]
        lines = [f"#SBATCH {option}" for option in options]
        lines += [f"export MOSA_ROOT={shlex.quote(str(ROOT))}"]
        lines += [f"export MOSA_TASKS_PER_NODE={self.request.tasks_per_node}"]
        if self.request.chain > 1:
            lines.append(f"export MOSA_CHAIN={shlex.quote(self.folder.name)}")
        lines.append(f"set -- {shlex.quote(str(self.folder / 'config.yaml'))}")
        return head + "\n".join(lines) + "\n" + rest

    def sbatch(self, after: str | None = None) -> list[str]:
        """The command that submits it, to begin when the job ``after`` has ended, however it ended."""
        dependency = [f"--dependency=afterany:{after}"] if after else []
        return ["sbatch", "--parsable", *dependency, str(self.folder / "job.sbatch")]

    def write(self) -> None:
        """Write configuration, script, command, versions and the state of the code.

        Raises:
            UserError: the run directory cannot be written.
        """
        try:
            self.folder.mkdir(parents=True)
            (self.run / "logs").mkdir(exist_ok=True)
            save_config(self.config, self.folder / "config.yaml")
            (self.folder / "job.sbatch").write_text(self.script, encoding="utf-8")
            (self.folder / "command.txt").write_text(f"{self.command}\n{shlex.join(self.sbatch())}\n", encoding="utf-8")
            found = {"python": platform.python_version()} | versions(*_PACKAGES)
            (self.folder / "versions.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (self.folder / "git.txt").write_text(git_state(ROOT), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"'{self.folder}' cannot be written ({error.strerror}); set run.directory to a writable folder"
            ) from None

    def submit(self) -> list[str]:
        """Write all and submit the chain; return the job ids.

        Raises:
            RunError: sbatch refused a job.
        """
        self.write()
        jobs: list[str] = []
        for _ in range(self.request.chain):
            command = self.sbatch(jobs[-1] if jobs else None)
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
            if done.returncode:
                before = f"; already submitted: {', '.join(jobs)} (scancel {' '.join(jobs)})" if jobs else ""
                raise RunError(f"sbatch refused the job: {' '.join(done.stderr.split())}{before}")
            jobs.append(done.stdout.strip().partition(";")[0])  # JOB, or JOB;CLUSTER
        (self.folder / "jobs.txt").write_text("\n".join(jobs) + "\n", encoding="utf-8")
        return jobs


def refuse_without_sbatch() -> None:
    """Submitting needs Slurm's client programs.

    Raises:
        RunError: they are not here.
    """
    if shutil.which("sbatch") is None:
        raise RunError(
            "sbatch is not on PATH: submit on a login node of a Slurm cluster, or see the job with --dry-run"
        )


def prepare(config: Config, request: Request, command: str) -> Submission:
    """Check that this many processes may start, as a job would; return what would be submitted.

    Raises:
        UserError: the first mistake.
    """
    world_size = request.nodes * request.tasks_per_node
    check_world_size(config, world_size)
    from megatron_mosa.train.start import check_start  # slow to import; other mistakes are told first

    check_start(config, world_size, devices_are_here=False)
    run = (Path(config.run.directory) / config.run.name).absolute()
    for name, path in (("run directory", run), ("present folder", Path.cwd())):
        if any(character.isspace() for character in str(path)):
            raise UserError(f"{name} '{path}': #SBATCH lines take no blanks; choose a path without")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = run / "submit" / stamp
    number = 1
    while folder.exists():
        number += 1
        folder = run / "submit" / f"{stamp}-{number}"
    return Submission(config, request, folder, command)


def git_state(root: Path) -> str:
    """The commit of the code and whether files differ from it, with the differences; or that it is no git checkout."""
    environment = os.environ | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(root), *words]
        try:
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", check=False, env=environment
            )
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    if commit is None or changes is None:
        return "not a git checkout\n"
    if not changes:
        return f"commit {commit.strip()}, clean\n"
    return f"commit {commit.strip()}, dirty\n{changes}\n{git('diff', 'HEAD') or ''}"
