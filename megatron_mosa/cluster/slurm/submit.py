"""Submission of a run to Slurm, from files that are kept in the run directory."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mosa.cluster.slurm.begin import check_restarts
from megatron_mosa.config import Config, check_world_size, save_config
from megatron_mosa.errors import RunError, UserError
from megatron_mosa.sbatch import as_pattern, seconds_of, unfit_for_a_line, value_of
from megatron_mosa.utils import tolerating, versions, write_atomically

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = Path("launch", "slurm", "pretrain.sbatch")
_OPTIONS_GO_HERE = "# -- mosa submit puts its options here\n"
_PACKAGES = ("torch", "megatron-core", "deepspeed", "triton", "numpy")


@dataclass(frozen=True)
class Request:
    """Resources and options to request from Slurm."""

    nodes: int
    tasks_per_node: int
    options: tuple[str, ...]
    """Additional options of sbatch, such as ``--time=24:00:00``."""

    chain: int = 1
    """Number of jobs to submit; each begins when the previous one has ended."""


@dataclass(frozen=True)
class Submission:
    """A job script and its directory; ``write`` and ``submit`` act on them."""

    config: Config
    request: Request
    folder: Path
    command: str
    """The command line of ``mosa submit``, kept for the record."""

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder.parents[1]

    @property
    def script(self) -> str:
        """The batch script with this job's options and configuration.

        Raises:
            UserError: the package was installed without its repository.
        """
        try:
            head, mark, rest = (ROOT / TEMPLATE).read_text(encoding="utf-8").partition(_OPTIONS_GO_HERE)
        except OSError as error:
            raise UserError(
                f"'{ROOT / TEMPLATE}' cannot be read ({error.strerror}); mosa submit needs the repository: clone "
                "it and install it with pip install -e"
            ) from None
        assert mark, f"{TEMPLATE} lacks the line {_OPTIONS_GO_HERE!r}"
        options = [
            f"--job-name={self.config.run.name}",
            f"--nodes={self.request.nodes}",
            f"--ntasks-per-node={self.request.tasks_per_node}",
            f"--chdir={Path.cwd()}",  # paths in the configuration may be relative
            f"--output={as_pattern(self.run / 'logs')}/slurm-%j.out",
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
        """Return the command that submits the job, to begin once the job ``after`` has ended in any way."""
        dependency = [f"--dependency=afterany:{after}"] if after else []
        return ["sbatch", "--parsable", *dependency, str(self.folder / "job.sbatch")]

    def write(self) -> None:
        """Write the configuration, script, command, versions and git state.

        Raises:
            UserError: the run directory is not writable.
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
                f"could not write to '{self.folder}' ({error.strerror}); set run.directory to a writable directory"
            ) from None

    def submit(self) -> list[str]:
        """Write the files and submit the chain; return the job ids.

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
        with tolerating(f"the numbers of the jobs are not recorded: {', '.join(jobs)}"):
            write_atomically(self.folder / "jobs.txt", "\n".join(jobs) + "\n")
        return jobs


def require_sbatch() -> None:
    """Check that Slurm's client programs are installed.

    Raises:
        RunError: sbatch is not on PATH.
    """
    if shutil.which("sbatch") is None:
        raise RunError(
            "sbatch is not on PATH; submit on a login node of a Slurm cluster, or print the job with --dry-run"
        )


def prepare(config: Config, request: Request, command: str) -> Submission:
    """Make the checks that the job will make at its start; return the submission.

    Raises:
        UserError: the first mistake found.
    """
    world_size = request.nodes * request.tasks_per_node
    check_world_size(config, world_size)
    check_restarts(config)
    _check_time(config, request.options)
    from megatron_mosa.train import check_start

    check_start(config, world_size, checks_devices=False)
    run = config.run.path.absolute()
    for name, path in (("run directory", run), ("current directory", Path.cwd())):
        if sign := unfit_for_a_line(str(path)):
            raise UserError(
                f"{name} {str(path)!r} contains {sign!r}, which a path in an #SBATCH line must not contain; choose "
                "another path"
            )
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = run / "submit" / stamp
    number = 1
    while folder.exists():
        number += 1
        folder = run / "submit" / f"{stamp}-{number}"
    return Submission(config, request, folder, command)


def _check_time(config: Config, options: Sequence[str]) -> None:
    """Raise a UserError if a job's time limit would stop the run before its first step."""
    time = value_of("time", options)
    signal = re.fullmatch(r".*@(\d+)", value_of("signal", options) or "")
    notices = {"resilience.stop_before_limit": config.resilience.stop_before_limit}
    if signal is not None:
        notices["--signal"] = float(signal[1])
    for name, seconds in notices.items():
        if time is not None and seconds >= seconds_of(time):
            raise UserError(
                f"--time={time} is {seconds_of(time):.0f} s, but {name} stops the run {seconds:g} s before that limit; "
                "allow more time, or stop later"
            )


def git_state(root: Path) -> str:
    """Return the commit of the code and all uncommitted changes, or a note that it is not a git checkout."""
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
