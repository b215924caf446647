"""The loaded Python, with which most tests start programs, behaves like the interpreter itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.loaded import loaded_python, wait_for_ranks

PROGRAMS = {
    "number": "raise SystemExit(7)",
    "text": "raise SystemExit('no')",
    "end": "print('out'); import sys; print('err', file=sys.stderr)",
    "error": "print('before'); 1 / 0",
    "arguments": "import sys; print(sys.argv[1:], __name__)",
    "place": "import os; print(os.getcwd(), oct(os.umask(0)), os.environ['MARK'], os.environ.get('HOME'))",
    "input": "print(input()[::-1])",
    "paths": "import here, beside; print(here.__name__, beside.__name__)",
    "atexit": "import atexit; atexit.register(print, 'at exit'); print('first')",
    "threads": "import threading; threading.Timer(0.1, print, ['later']).start()",
    "os._exit": "import os; print('lost'); os._exit(5)",
    "term": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "interrupt": "raise KeyboardInterrupt",
    "handler": "import os, signal; signal.signal(signal.SIGINT, lambda *_: print('asked')); os.kill(os.getpid(), 2)",
    "file size": "open('big', 'wb').write(bytes(20_000))",
}


def outcome(python: str, form: str, name: str, folder: Path) -> tuple[int, str, str]:
    """Return what the caller of the program sees: exit code, standard output, and standard error."""
    (folder / "module").mkdir(parents=True, exist_ok=True)
    (folder / "here.py").touch()
    (folder / "module" / "beside.py").touch()
    for file in ("program.py", "module/__init__.py", "module/__main__.py"):
        (folder / file).write_text(PROGRAMS[name] if file != "module/__init__.py" else "")
    command = {"file": ["program.py"], "-m": ["-m", "module"], "-c": ["-W", "ignore", "-c", PROGRAMS[name]]}[form]
    limit = f'ulimit -f {10 if name == "file size" else 100}; umask 027; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", limit, "bash", python, *command, "a b", "--c"], cwd=folder, input="abc\n", text=True,
        env=os.environ | {"MARK": "ä\n", "PYTHONPATH": str(folder / "module")}, capture_output=True, check=False,
    )  # fmt: skip
    # only the last line of a traceback, which has more frames
    last = re.sub(r"(?s)^Traceback.*\n(?=\S)", "", done.stderr)
    return done.returncode, done.stdout, last


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_behave_as_under_the_interpreter(name: str, tmp_path: Path) -> None:
    for form in ("file", "-m", "-c") if name in ("arguments", "paths") else ("file",):
        expected = outcome(sys.executable, form, name, tmp_path)
        assert outcome(loaded_python(), form, name, tmp_path) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("setting", ["SIG_DFL", "lambda *_: exit(3)"])
def test_signals_are_passed_on(number: signal.Signals, setting: str) -> None:
    handler = setting.replace("SIG_DFL", "signal.SIG_DFL")
    # Not one long sleep: a signal just before it would be handled after it.
    code = (
        f"import signal, time; signal.signal({number}, {handler}); print('ready', flush=True)\n"
        "for _ in range(1200): time.sleep(0.05)"
    )
    with subprocess.Popen([loaded_python(), "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(30) == (-number if setting == "SIG_DFL" else 3)


def test_a_killed_program_leaves_nothing_and_shows_its_command() -> None:
    # In one write, because both processes share the pipe.
    code = "import os, time; os.fork(); os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)"
    with subprocess.Popen([loaded_python(), "-c", code, "mark=1"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        both = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
        assert all("mark=1" in child.cmdline() for child in both)
        process.kill()
    deadline = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in both):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_are_terminated_once_if_one_fails(tmp_path: Path) -> None:
    ready = f"{str(tmp_path / 'ready')!r}"  # the first rank ignores the signal from then on, and the second fails
    stubborn = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, lambda *_: None); "
        f"pathlib.Path({ready}).touch(); time.sleep(1.5); exit(4)"
    )
    fails = f"import os, time\nwhile not os.path.exists({ready}): time.sleep(0.01)\nexit(2)"
    ranks = [
        subprocess.Popen([loaded_python(), "-c", text]) for text in (stubborn, fails, "import time; time.sleep(60)")
    ]
    assert wait_for_ranks(ranks) == [4, 2, -signal.SIGTERM]


def test_ranks_that_hang_show_their_stacks(tmp_path: Path) -> None:
    code = f"import os, time\ndef waits(): time.sleep(60)\nos.fork()\nwaits()  # {tmp_path}"
    with (tmp_path / "err").open("w") as errors:
        ranks = [subprocess.Popen([loaded_python(), "-c", code], stderr=errors)]
        with pytest.raises(TimeoutError, match=r"did not end within 0\.5 s"):
            wait_for_ranks(ranks, 0.5)
    assert (tmp_path / "err").read_text().count("in waits\n") == 2  # with the loader's
