"""Entry points: garbage collection, the table of commands and ``mosa pretrain``."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from megatron_mosa.cli import COMMANDS, Group, app
from megatron_mosa.commands import pretrain as commands_pretrain
from megatron_mosa.commands.training import start_training
from megatron_mosa.entry import quick_imports, run
from megatron_mosa.errors import UserError
from megatron_mosa.exit_codes import STOPPED


def test_the_collector_ignores_imported_objects_and_then_resumes() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), quick_imports():
            assert gc.get_threshold()[0] == 0  # off
            module = {"a": []}
            raise ImportError
        assert gc.get_threshold() == before
        assert gc.get_freeze_count() > frozen
        assert not any(thing is module for thing in gc.get_objects())
        assert any(thing is now for now in [{"b": []}] for thing in gc.get_objects())
    finally:
        gc.unfreeze()


def test_what_imports_decorate_is_compiled_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def record(function: Callable, **options: object) -> Callable:
        compiled.append((function.__name__, options))
        return lambda x: function(x) + 100

    monkeypatch.setattr(torch, "compile", record)
    try:
        with quick_imports():

            @torch.compile
            def plain(x: int) -> int:
                return x + 1

            @torch.compile(dynamic=False)
            def optioned(x: int) -> int:
                return x + 2

        assert torch.compile is record and not compiled
        assert [plain(0), optioned(0), plain(1)] == [101, 102, 102]
        assert compiled == [("plain", {}), ("optioned", {"dynamic": False})]
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert plain(0) == 1  # what calls it is compiled with it
    finally:
        gc.unfreeze()


def test_a_program_exits_without_a_final_collection() -> None:
    made = []
    try:
        assert run(lambda: made.append({"a": []})) == 0
        assert not any(thing is made[0] for thing in gc.get_objects())
    finally:
        gc.unfreeze()


def test_mosa_pretrain_starts_training_and_exits_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(path: Path, overrides: list[str], *, check_only: bool, world_size: int | None) -> int:
        started.append((path, overrides, check_only, world_size, gc.get_threshold()))
        return STOPPED

    monkeypatch.setattr(commands_pretrain, "start_training", start)
    before = gc.get_threshold()
    try:
        arguments = ["pretrain", "c.yaml", "--local_rank=1", "train.steps=3", "run.name=a"]
        assert CliRunner().invoke(app, arguments).exit_code == STOPPED
        arguments = ["pretrain", "c.yaml", "--check-only", "--world-size", "2"]
        assert CliRunner().invoke(app, arguments).exit_code == STOPPED
    finally:
        gc.set_threshold(*before)
    assert started == [
        (Path("c.yaml"), ["train.steps=3", "run.name=a"], False, None, (700, 10, 10)),
        (Path("c.yaml"), [], True, 2, (700, 10, 10)),
    ]


def test_a_world_size_without_check_only_is_rejected() -> None:
    with pytest.raises(UserError, match="--world-size must be .* and needs --check-only, got 2"):
        start_training("c.yaml", [], world_size=2)


def _names(group: Group, before: str = "mosa") -> list[str]:
    return [
        *([before] if group.default is not None else []),
        *(
            name
            for key, command in group.commands.items()
            for name in (_names(command, f"{before} {key}") if isinstance(command, Group) else [f"{before} {key}"])
        ),
    ]


def test_the_table_has_every_promised_command() -> None:
    promised = """mosa pretrain|mosa data build|mosa data index|mosa data inspect|mosa data verify|mosa data sample
        mosa checkpoint inspect|mosa checkpoint reshard|mosa checkpoint export|mosa checkpoint import
        mosa checkpoint verify|mosa checkpoint causalize|mosa config show|mosa config diff|mosa config list
        mosa evaluate|mosa generate|mosa cache-report|mosa decode-bench|mosa bench
        mosa isoflop|mosa isoflop run|mosa isoflop match|mosa report
        mosa sweep|mosa compare|mosa submit|mosa status|mosa doctor"""
    assert sorted(_names(COMMANDS)) == sorted(name.strip() for name in promised.replace("\n", "|").split("|"))


INTERRUPTIONS = {
    "in the program": "run(interrupt)",
    "caught by a library": """
def library():
    try: interrupt()
    except BaseException: raise ValueError
run(library)""",
    "turned into an exit code": """
def typer():
    try: interrupt()
    except KeyboardInterrupt: return 130
run(typer)""",
    "swallowed in an import": """
import pathlib, sys, tempfile
with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "swallows.py").write_text("import __main__\\ntry: __main__.interrupt()\\nexcept: pass\\n")
    sys.path.insert(0, folder)
    run(lambda: __import__("swallows"))""",
    "in a quiet import": """
import pathlib, sys, tempfile
from megatron_mosa.cluster.doctor.node import import_quietly
with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "interrupts.py").write_text("import __main__\\n__main__.interrupt()\\n")
    sys.path.insert(0, folder)
    run(lambda: import_quietly("interrupts"))""",
}


def test_an_interrupted_look_at_a_version_can_be_caught() -> None:
    """Programs that write their results when they are interrupted ask for versions all the time."""
    code = """
import importlib.metadata, os, signal, sys
from megatron_mosa.entry import run
importlib.metadata.MetadataPathFinder.find_distributions = lambda *_: os.kill(os.getpid(), signal.SIGINT)
def program():
    try: importlib.metadata.version("torch")
    except KeyboardInterrupt: return 5
sys.exit(run(program))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (5, "")


@pytest.mark.parametrize("place", INTERRUPTIONS)
def test_an_interruption_ends_in_one_line(place: str) -> None:
    setup = "import os, signal, sys\nfrom megatron_mosa.entry import run\n"
    setup += "interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)"
    *before, last = INTERRUPTIONS[place].replace("\\\\n", "\\n").strip().rsplit("run(", 1)
    code = f"{setup}\n{'run('.join(before)}sys.exit(run({last})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_interruption_inside_an_exec_keeps_its_exit_code(tmp_path: Path) -> None:
    """Dataclasses, for one, are made by exec; Python would then end a module by the signal itself."""
    code = "import sys\nfrom megatron_mosa.entry import run\nkill = 'import os; os.kill(os.getpid(), 2)'\n"
    (tmp_path / "interrupted.py").write_text(code + "sys.exit(run(lambda: exec(kill)))\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


FAILURES = {
    "print('a')": (1, "error: could not write the output: No space left on device; free some space and start again\n"),
    "open('/proc/version/x')": (1, "error: could not use '/proc/version/x': Not a directory\n"),
    "open('a' * 300)": (2, f"error: could not use '{'a' * 300}': File name too long\n"),
}


@pytest.mark.parametrize("program", FAILURES)
def test_what_a_file_system_refuses_is_one_line(program: str) -> None:
    code = f"import sys\nfrom megatron_mosa.entry import run\nsys.exit(run(lambda: {program}))"
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    expected, line = FAILURES[program]
    assert done.returncode == expected and done.stderr.startswith(line) and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(("flags", "expected"), [([], 0), (["-u"], 1)])
def test_output_that_nobody_reads_ends_without_a_word(flags: list[str], expected: int) -> None:
    """With -u Python writes at once, and the program ends in its middle."""
    code = "import sys\nfrom megatron_mosa.entry import run\nsys.exit(run(lambda: print('a')))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], stdout=writing, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (expected, b"")
