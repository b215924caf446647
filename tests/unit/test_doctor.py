"""``mosa doctor``: comparisons between nodes with hand-made numbers, and the command on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_mosa.cli import app
from megatron_mosa.cluster.doctor import job as doctor_job
from megatron_mosa.cluster.doctor import node as doctor_node
from megatron_mosa.cluster.doctor.collectives import _summand, bus_bandwidth
from megatron_mosa.cluster.doctor.meeting import absent_nodes
from megatron_mosa.cluster.doctor.node import Finding, Report, check_gpus, check_versions, driver_version
from megatron_mosa.cluster.doctor.options import DoctorOptions
from megatron_mosa.cluster.doctor.verdict import Verdict, as_json, judge, lines, minority
from megatron_mosa.entry import run
from megatron_mosa.exit_codes import STOPPED


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in [*launcher, *(name for name in os.environ if name.startswith("SLURM"))]:
        monkeypatch.setenv(name, "")  # restored afterwards, also where the code sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")


def reports(name: str, *values: object, **facts: object) -> list[Report]:
    """One rank per node, n0, n1, ..., each with one value of the fact ``name``."""
    return [Report(rank, f"n{rank}", {name: value, **facts}) for rank, value in enumerate(values)]


def judged(found: list[Report], slow: float = 1.5) -> tuple[list[str], list[str]]:
    """Return the bad nodes, and those with warnings."""
    verdict = judge(found, slow)
    warned = [node for finding in verdict.findings if not finding.is_bad for node in finding.nodes]
    return verdict.bad_nodes, warned


def test_minority_returns_the_odd_ranks_and_a_tie_goes_to_the_first() -> None:
    assert minority({0: "a", 1: "b", 2: "b"}) == ("b", [0])
    assert minority({1: "b", 0: "a"}) == ("a", [1])
    assert minority({0: None, 1: None}) == (None, [])


def test_a_different_version_is_bad_and_a_different_driver_a_warning() -> None:
    assert judged(reports("torch", "2.6.0", "2.13.0", "2.13.0")) == (["n0"], [])
    assert judged(reports("driver", "570.1", "580.1", "580.1")) == ([], ["n0"])
    assert judged(reports("torch", "2.6.0", "2.6.0")) == ([], [])
    line = lines(judge(reports("torch", "2.6.0", "2.6.0", None), 1.5).findings[0])[0]
    assert line.startswith("error: node n2: torch is absent where most ranks have 2.6.0; ")


def test_a_slow_gpu_is_bad_and_a_slow_cpu_a_warning() -> None:
    card = [{"uuid": "a", "name": "H100"}]
    assert judged(reports("matrix_tflops", [600.0], [390.0], gpus=card)) == (["n1"], [])
    assert judged(reports("matrix_tflops", [600.0], [410.0], gpus=card)) == ([], [])  # 1.46 times
    assert judged(reports("matrix_tflops", [600.0], [410.0], gpus=card), slow=1.4) == (["n1"], [])
    assert judged(reports("matrix_tflops", [600.0], [610.0], [990.0], gpus=card)) == ([], [])  # one is fast
    assert judged(reports("matrix_tflops", [0.1], [0.01])) == ([], ["n1"])
    assert judged(reports("matrix_tflops", [600.0, 600.0, 300.0], gpus=card)) == (["n0"], [])  # three GPUs on one node


def test_a_node_that_lost_a_gpu_is_bad() -> None:
    def cards(*names: str) -> list[dict[str, str]]:
        return [{"uuid": name, "name": "H100"} for name in names]

    assert judged(reports("gpus", cards("a", "b"), cards("c"), cards("d", "e"))) == (["n1"], [])
    # Each process may see only its own GPU: GPUs are counted per node.
    bound = [Report(rank, f"n{rank // 2}", {"gpus": cards(str(rank))}) for rank in range(4)]
    assert judged(bound) == ([], [])


def test_clocks_are_compared_with_the_median_of_three_or_more() -> None:
    assert judged(reports("clock_offset_s", 0.0, 0.9)) == ([], [])
    assert judged(reports("clock_offset_s", 0.0, -2.0)) == ([], ["n1"])
    assert judged(reports("clock_offset_s", 0.0, 61.0)) == (["n1"], [])
    assert judged(reports("clock_offset_s", 0.0, 100.0, 100.1)) == (["n0"], [])


def test_a_fault_of_all_nodes_blames_none() -> None:
    found = reports("torch", "2.6.0", "2.6.0", "2.6.0")
    for report in found:
        report.add("free space", "3 GiB free", "make room")
    verdict = judge(found, 1.5)
    assert verdict.is_bad and verdict.bad_nodes == []
    assert [line for finding in verdict.findings for line in lines(finding)] == [
        "error: all 3 nodes: 3 GiB free; make room"
    ]
    assert judge(found[:1], 1.5).bad_nodes == ["n0"]


def test_what_65536_ranks_sum_stays_below_the_integers_of_fp32() -> None:
    assert max(_summand(rank, 1000, torch.device("cpu")).max() for rank in range(60)) * 2**16 < 2**24


def test_failed_collectives_blame_only_the_nodes_that_failed() -> None:
    found = reports("torch", "2.6.0", "2.6.0")
    found[1].facts["communication_failure"] = "all-reduce failed (x)"
    assert judge(found, 1.5).bad_nodes == ["n1"]
    found[0].facts["communication_failure"] = "all-reduce did not finish within 5 s"
    assert judge(found, 1.5).is_bad and judge(found, 1.5).bad_nodes == []


def test_bus_bandwidth_matches_the_definition_of_nccl_tests() -> None:
    # 8 ranks, 1 GB in 10 ms: algorithm bandwidth 100 GB/s, times 2 * 7/8 or 7/8
    assert bus_bandwidth("all-reduce", 10**9, 0.01, 8) == pytest.approx(175.0)
    assert bus_bandwidth("all-gather", 10**9, 0.01, 8) == pytest.approx(87.5)


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (dvs)",
    ],
)
def test_the_driver_version_is_parsed(line: str, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.2.0\n")
    assert driver_version(tmp_path / "version") == "535.104.05"
    assert driver_version(tmp_path / "absent") is None


def test_each_process_checks_its_share_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(position: int, peers: int) -> Report:
        report = Report(0, "n0")
        check_gpus(report, position, peers)
        return report

    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="H100", uuid=f"u{i}"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ((60 if i == 3 else 79) * gib, 80 * gib))
    monkeypatch.setattr(doctor_node, "matrix_tflops", lambda device: 600.0 + device.index)
    assert check(0, 1).facts["matrix_tflops"] == [600.0, 601.0, 602.0, 603.0]
    assert check(0, 2).facts["matrix_tflops"] == [600.0, 602.0]
    assert [str(f) for f in check(0, 2).findings] == []
    busy = check(1, 2).findings
    assert len(busy) == 1 and not busy[0].is_bad and "GPU 3: 20.0 of 80.0 GiB" in busy[0].what


def test_gpus_invisible_to_torch_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor_node.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor_node, "matrix_tflops", lambda device: 0.1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    report = Report(0, "n0")
    check_gpus(report, 0, 1)
    assert len(report.findings) == 1 and report.findings[0].is_bad
    assert "driver on your system is too old (found version 11040)" in report.findings[0].what
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on purpose
    report = Report(0, "n0")
    check_gpus(report, 0, 1)
    assert report.findings == []


def test_a_wrong_apex_is_bad_and_never_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('the code of the wrong apex ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    report = Report(0, "n0")
    check_versions(report)
    assert [finding.check for finding in report.findings] == ["apex"]
    assert "is not NVIDIA apex" in report.findings[0].what and "pip uninstall apex" in report.findings[0].fix
    assert "apex" not in sys.modules


def test_a_torch_that_cannot_be_imported_is_one_error_line(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "megatron_mosa", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert done.returncode == 1
    assert "error: node n7: torch cannot be imported (libcudart.so.13: cannot open shared object); " in done.stderr
    assert "Traceback" not in done.stderr + done.stdout and "verdict: bad" in done.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--timeout=0", "--timeout must be greater than 0 and at most 86400, got 0"),
        ("--slow=1", "--slow must be greater than 1 and at most 1000, got 1"),
        ("--minimum-disk=-1", "--minimum-disk must be at least 0 and at most 1000000000, got -1"),
    ],
)
def test_options_out_of_range_exit_with_2(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda: app(["doctor", option])) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_healthy_machine_exits_with_0_and_nothing_is_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "out" / "doctor.json"
    with pytest.raises(SystemExit) as exit_:
        app(["doctor", "--run-directory", str(tmp_path / "a" / "runs"), "--json", str(found), "--minimum-disk", "0"])
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured
    assert "verdict: healthy (1 node, 1 rank" in captured.out and captured.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    content = json.loads(found.read_text())
    assert content["bad_nodes"] == [] and content["is_bad"] is False
    rank = content["ranks"][0]
    assert (rank["node"], rank["facts"]["torch"]) == ("n7", torch.__version__)
    assert rank["facts"]["write_mib_s"] > 0 and rank["facts"]["matrix_tflops"][0] > 0


def test_an_unwritable_run_directory_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        app(["doctor", "--run-directory", str(tmp_path / "file" / "runs"), "--json", str(tmp_path / "doctor.json")])
    assert exit_.value.code == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith(
        f"error: node n7: could not write to run directory {tmp_path}/file/runs (Not a directory)"
    )
    assert json.loads((tmp_path / "doctor.json").read_text())["bad_nodes"] == ["n7"]


def test_too_little_space_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        app(["doctor", "--run-directory", str(tmp_path), "--minimum-disk", "1e9"])
    assert exit_.value.code == 1 and "but needs 1e+09; free some space" in capsys.readouterr().err


@pytest.mark.parametrize(("found", "code"), [(0, STOPPED), (1, 1)])
def test_sigusr1_during_the_checks(monkeypatch: pytest.MonkeyPatch, found: int, code: int) -> None:
    def examine(_: DoctorOptions) -> int:
        os.kill(os.getpid(), signal.SIGUSR1)
        return found

    monkeypatch.setattr(doctor_job, "check_job", examine)
    with pytest.raises(SystemExit) as exit_:
        app(["doctor"])
    assert exit_.value.code == code


def test_an_unwritable_json_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    settings = DoctorOptions(tmp_path, tmp_path / "file" / "doctor.json", timeout=5, minimum_disk=0, slow=1.5)
    assert doctor_job._publish(Verdict([], [], [], []), settings) == 1
    assert "error: writing --json=" in capsys.readouterr().err


def test_a_hanging_check_times_out_and_is_bad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    released = threading.Event()
    monkeypatch.setattr(doctor_node, "check_versions", lambda report: report.facts.update(torch=None))
    monkeypatch.setattr(doctor_node, "check_directory", lambda *_: released.wait(60))
    report = Report(0, "n0")
    assert doctor_job._look(report, ["n0"], None, DoctorOptions(tmp_path, None, timeout=0.3, minimum_disk=0, slow=1.5))
    released.set()
    assert [finding.what for finding in report.findings] == ["the check 'run directory' did not finish within 0.3 s"]


def test_nccl_needs_one_gpu_per_rank_and_a_hanging_check_skips_collectives() -> None:
    def plan(*cards: str, stage: str = "done") -> str | None:
        gpus = [[{"uuid": card}] if card else [] for card in cards]
        found = [
            Report(rank, f"n{rank}", {"torch": "2.6.0", "gpus": gpu}, stage="done") for rank, gpu in enumerate(gpus)
        ]
        found[-1].stage = stage
        return doctor_job._plan(found)

    assert plan("a", "b") == "nccl"
    assert plan("a", "a") == plan("a", "") == plan("", "") == "gloo"
    assert plan("a", "b", stage="GPUs") is None and plan("a") is None


def test_absent_nodes_are_named_under_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[3-5]" ] && printf "n3\\nn4\\nn5\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert absent_nodes({0: "n3"}) == []
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[3-5]")
    assert absent_nodes({0: "n3", 2: "n5"}) == ["n4"]


def test_the_json_file_holds_findings_and_facts() -> None:
    report = Report(0, "n0", {"torch": "2.6.0"})
    finding = Finding("torch", "what", "fix", nodes=("n0",))
    content = json.loads(json.dumps(as_json(Verdict([], [finding], ["n0"], [report]))))
    assert content["is_bad"] is True and content["bad_nodes"] == ["n0"]
    assert content["findings"] == [{"check": "torch", "what": "what", "fix": "fix", "is_bad": True, "nodes": ["n0"]}]
    assert content["ranks"][0]["facts"] == {"torch": "2.6.0"}
