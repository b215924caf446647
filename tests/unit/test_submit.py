"""Chains of jobs, submitted to a fake sbatch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mosa.cluster.slurm.command import submit
from megatron_mosa.cluster.slurm.submit import TEMPLATE, Request, Submission, prepare
from megatron_mosa.config import config_from_dict
from megatron_mosa.errors import RunError, UserError

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

SBATCH = """#!/bin/sh
echo "$@" >> "$CALLS"
number=$(wc -l < "$CALLS")
[ "$number" -lt "$REFUSED" ] || { echo no such partition >&2; exit 1; }
echo "$((100 + number));cluster"
"""


@pytest.fixture
def submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submission:
    """A chain of three jobs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("REFUSED", "99")
    config = config_from_dict(
        {
            "run": {"name": "run"},
            "model": {"num_layers": 1, "hidden_size": 16},
            "mosa": {"num_heads": 0},
            "data": {"path": "unused", "sequence_length": 8},
            "train": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 4},
        }
    )
    request = Request(nodes=2, tasks_per_node=2, options=("--time=10:00",), chain=3)
    return Submission(config, request, tmp_path / "run" / "submit" / "now", "mosa submit")


STUBS = {
    # -m megatron_mosa.cluster.slurm.NAME ARGUMENT...
    "python": """case $2 in
    *.begin) printf '%s\\n' "$RUN" go ;;
    *.verdict) printf '%s\\n' done 0 ;;
esac""",
    "srun": "",
    "scontrol": "echo localhost",
    "getent": "",
}
NAMES = ["plain", "$HOME", "a;b&c", "`id`", "$(id)", "*?[x]", "!a", "50%j", "(a)", "größe", "=,", "~", "a|b>c"]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_with_odd_paths_runs(
    submission: Submission, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By bash, with stubs that record their arguments; the repository's directory may have any name."""
    root, run = tmp_path / f"my 'code' \"{name}\" # \\" / name, tmp_path / name / "runs"
    (root / "launch" / "slurm").mkdir(parents=True)
    shutil.copy(QUICKSTART.parents[1] / TEMPLATE, root / TEMPLATE)
    (root / "pretrain_mosa.py").touch()
    run.mkdir(parents=True)
    for program, body in STUBS.items():
        text = f"""#!/bin/bash\nprintf '%s\\n' "{program}" "$@" >> "$CALLS"\n{body}\n"""
        (tmp_path / "bin" / program).write_text(text)
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setattr("megatron_mosa.cluster.slurm.submit.ROOT", root)
    monkeypatch.chdir(run)
    odd = replace(submission, folder=run / "submit" / "now")
    odd.write()
    script = odd.folder / "job.sbatch"
    environment = {"PATH": os.environ["PATH"], "CALLS": str(tmp_path / "calls"), "RUN": str(run), "VIRTUAL_ENV": "x"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment |= {"SLURM_CPUS_ON_NODE": "2", "MOSA_PREFLIGHT": "0"}
    assert subprocess.run(["bash", "-n", script], check=True).returncode == 0
    done = subprocess.run(["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"the run is done: {run}" in done.stdout, done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    config = str(odd.folder / "config.yaml")
    begin, srun = calls.index("megatron_mosa.cluster.slurm.begin"), calls.index("srun")
    assert calls[begin + 1 : begin + 3] == ["4", config]
    escaped = str(run).replace("%", "%%")
    assert calls[srun + 6 :][:6] == [
        f"--output={escaped}/logs/7-0-1/rank-%t.log", "python", "-u", f"{root}/pretrain_mosa.py", config, "python",
    ]  # fmt: skip
    lines = script.read_text().splitlines()
    assert f"#SBATCH --output={escaped}/logs/slurm-%j.out" in lines and f"#SBATCH --chdir={run}" in lines


@pytest.mark.parametrize("sign", [" ", "\t", "'", '"', "\\", "#", "\n", "\x07", "\u2028"])
def test_a_path_that_sbatch_would_misread_is_refused(
    sign: str, submission: Submission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_mosa.train.check_start", lambda *_, **__: None)
    odd = replace(submission.config.run, directory=f"{tmp_path}/a{sign}b")
    with pytest.raises(UserError, match=r"run directory .* which a path in an #SBATCH line must not contain") as caught:
        prepare(replace(submission.config, run=odd), submission.request, "")
    assert repr(sign) in str(caught.value)
    (tmp_path / f"a{sign}b").mkdir()
    monkeypatch.chdir(tmp_path / f"a{sign}b")
    here = replace(submission.config.run, directory=str(tmp_path))
    with pytest.raises(UserError, match="current directory"):
        prepare(replace(submission.config, run=here), submission.request, "")


def test_each_job_of_a_chain_waits_for_the_previous_one(submission: Submission, tmp_path: Path) -> None:
    assert submission.submit() == ["101", "102", "103"]
    script = str(submission.folder / "job.sbatch")
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable {script}",
        f"--parsable --dependency=afterany:101 {script}",
        f"--parsable --dependency=afterany:102 {script}",
    ]
    assert (submission.folder / "jobs.txt").read_text() == "101\n102\n103\n"
    assert "export MOSA_CHAIN=now\n" in Path(script).read_text()


def test_a_refused_chain_names_the_jobs_already_submitted(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", "3")
    with pytest.raises(RunError, match=r"no such partition; already submitted: 101, 102 \(scancel 101 102\)"):
        submission.submit()


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["resilience.stop_before_limit=3600"], {"time": "1:00:00"},
         "--time=1:00:00 is 3600 s, but resilience.stop_before_limit stops the run 3600 s before that limit; allow "),
        (["resilience.stop_before_limit=300"], {"sbatch_argument": ["-t5"]}, "--time=5 is 300 s, but "),
        ([], {"time": "1-00:00", "sbatch_argument": ["--signal=B:USR1@86400"]}, "but --signal stops the run 86400 s "),
        (["checkpoint.resume=never"], {}, "checkpoint.resume=never would end the job when it starts the run again"),
        ([], {"tasks_per_node": None, "sbatch_argument": ["--gres=gpu:h100:8"]},
         "--gres=gpu:h100:8 allocates GPUs, but a node would have one task"),
        ([], {"tasks_per_node": None, "sbatch_argument": ["-G8"]}, "--gpus=8 allocates GPUs"),
        # and what is enough, so that the missing dataset is next
        ([], {"tasks_per_node": 2, "sbatch_argument": ["--gres=gpu:2"]}, "data.path=.* does not exist"),
        ([], {"tasks_per_node": None, "sbatch_argument": ["--gres=tmp:8"]}, "data.path=.* does not exist"),
        (["resilience.stop_before_limit=299"], {"time": "5:00"}, "data.path=.* does not exist"),
        (["resilience.stop_before_limit=9999"], {"time": "UNLIMITED"}, "data.path=.* does not exist"),
        (["resilience.stop_before_limit=9999"], {"time": "0"}, "data.path=.* does not exist"),  # no limit, too
    ],
)  # fmt: skip
def test_a_job_that_could_not_do_its_work_is_refused(
    overrides: list[str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        submit(QUICKSTART, [f"data.path={tmp_path / 'none'}", *overrides], nodes=2, dry_run=True, **options)


def test_a_batch_that_does_not_fit_all_ranks_is_refused_before_anything_is_written(
    submission: Submission, tmp_path: Path
) -> None:
    """Four nodes of two tasks, two of which share a model: four data-parallel ranks."""
    values = [f"run.directory={tmp_path / 'runs'}", f"data.path={tmp_path / 'none'}", "train.global_batch_size=24"]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        submit(QUICKSTART, [*values, "train.micro_batch_size=5"], nodes=4, tasks_per_node=2)
    product = "train.micro_batch_size=5 x 4 data-parallel ranks = 20"
    fixes = "train.global_batch_size=20, or train.micro_batch_size=3 or 6"
    assert str(caught.value) == f"train.global_batch_size=24 must be divisible by {product}; set {fixes}"
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="data.path=.* does not exist"):  # with such a size, what is next
        submit(QUICKSTART, [*values, "train.micro_batch_size=3"], nodes=4, tasks_per_node=2)
