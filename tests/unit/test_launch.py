"""Rank, world size and address under each launcher."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatron_mosa.commands.local import number_of_processes
from megatron_mosa.errors import UserError
from megatron_mosa.parallel import FirstFailure, join_store, launch_environment

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*VARIABLES, "LOCAL_WORLD_SIZE", *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # restored afterwards, also where the code sets it
        monkeypatch.delenv(name)


def test_plain_python_is_a_world_of_one() -> None:
    assert launch_environment() == (0, 1, 0)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert 1024 <= int(os.environ["MASTER_PORT"]) < 65536
    assert launch_environment() == (0, 1, 0)  # asking twice changes nothing


def test_torchrun_and_deepspeed_set_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(VARIABLES, ("5", "8", "1", "node7", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    assert launch_environment() == (5, 8, 1)
    assert os.environ["MASTER_ADDR"] == "node7"


def test_srun_takes_the_first_node_and_a_port_from_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = {"STEP_NUM_TASKS": "4", "PROCID": "3", "LOCALID": "1", "JOB_NODELIST": "n[3-4]", "JOB_ID": "1234567"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert launch_environment() == (3, 4, 1)
    assert os.environ["MASTER_ADDR"] == "n3"
    assert os.environ["MASTER_PORT"] == str(20000 + 1234567 % 10000)
    assert os.environ["RANK"] == "3"  # DeepSpeed reads these
    for name in VARIABLES[:3]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.3")  # the batch script gives an address where the name does not resolve
    monkeypatch.setenv("MASTER_PORT", "20100")
    assert launch_environment() == (3, 4, 1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.3", "20100")


def test_plain_python_in_a_batch_script_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": "4", "PROCID": "0", "LOCALID": "0", "JOB_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert launch_environment() == (0, 1, 0)


WORLD = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
MISTAKES = [
    ({"RANK": "0"}, "RANK is set, but WORLD_SIZE and LOCAL_RANK not"),
    ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE and LOCAL_RANK are set, but RANK not"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but RANK and LOCAL_RANK not"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment must be a whole number at least 1, got 'two'"),
    (
        WORLD | {"RANK": "2"},
        r"RANK in the environment must be a whole number between 0 and 1 \(WORLD_SIZE=2\), got '2'",
    ),
    (WORLD | {"RANK": "-1"}, "RANK .* got '-1'"),
    (WORLD | {"RANK": "1.5"}, "RANK .* got '1.5'"),
    (WORLD | {"RANK": "²"}, "RANK .* got '²'"),
    (WORLD | {"WORLD_SIZE": "0"}, "WORLD_SIZE .* at least 1, got '0'"),
    (WORLD | {"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE .* at least 1, got '9"),
    (WORLD | {"LOCAL_RANK": "x"}, "LOCAL_RANK .* got 'x'"),
    (WORLD | {"LOCAL_RANK": "2"}, "LOCAL_RANK .* between 0 and 1"),
    (WORLD | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE .* at least 1, got '0'"),
    (WORLD | {"MASTER_ADDR": ""}, "MASTER_ADDR must be the address of rank 0's node for 2 processes"),
    (WORLD | {"MASTER_PORT": ""}, "MASTER_PORT .* between 1 and 65535, got ''"),
    (WORLD | {"MASTER_PORT": "http"}, "MASTER_PORT .* got 'http'"),
    (WORLD | {"MASTER_PORT": "65536"}, "MASTER_PORT .* got '65536'"),
    (STEP | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS .* got 'many'"),
    (STEP | {"SLURM_PROCID": "2"}, r"SLURM_PROCID .* between 0 and 1 \(SLURM_STEP_NUM_TASKS=2\), got '2'"),
    ({name: value for name, value in STEP.items() if name != "SLURM_LOCALID"}, "SLURM_LOCALID .* is not set"),
    (STEP | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID .* got 'x'"),
]


@pytest.mark.parametrize(("variables", "message"), MISTAKES)
def test_mistakes_in_the_variables_of_a_launcher(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        launch_environment()


@pytest.mark.parametrize(("gpus", "chosen", "number"), [(0, "", 2), (1, "", 1), (6, "", 4), (8, "", 8), (8, "3", 3)])
def test_processes_on_one_machine(gpus: int, chosen: str, number: int) -> None:
    assert number_of_processes(gpus, chosen) == number


def test_a_single_process_needs_no_free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(taken.getsockname()[1]))):
            monkeypatch.setenv(name, value)
        store = join_store(seconds=1)
    assert FirstFailure(store, rank=0, world_size=1).claim("why")
    assert store.check(["failures/first"])
