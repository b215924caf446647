"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_mosa.utils.errors import file_problem, first_line
from megatron_mosa.utils.files import naming, replace_directory, tolerating, write_atomically


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_content_alone(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomically(file, "öld", durable=True)
    with monkeypatch.context() as context, pytest.raises(OSError, match="No space left"):
        context.setattr(os, call, fail)
        write_atomically(file, "new", durable=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_bytes().decode() == "öld"
    write_atomically(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "new"


def test_an_error_names_the_file(tmp_path: Path) -> None:
    """Errors of writing to a full disk name none."""
    with pytest.raises(OSError) as caught, naming(tmp_path / "file"), open("/dev/full", "w") as full:
        full.write("a")
    assert file_problem(caught.value).startswith(f"could not write '{tmp_path}/file': No space left on device; free")


def test_devices_are_written_to(tmp_path: Path) -> None:
    """The user may be root, and --output=/dev/null."""
    for name in ("null", "full"):
        (tmp_path / name).symlink_to(f"/dev/{name}")
    write_atomically(tmp_path / "null", "a")
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(tmp_path / "full", "a")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_char_device()) == ["full", "null"]


def test_what_is_tolerated_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("one", "one", "two"):
        with tolerating(what):
            fail()
    assert capsys.readouterr().err == "".join(
        f"warning: {what}: could not write: No space left on device\n" for what in ("one", "two")
    )
    with pytest.raises(ValueError), tolerating("one"):
        raise ValueError
    with tolerating("output"):  # a run goes on when whoever read its output has left
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert capsys.readouterr().err == "warning: output: could not write: Broken pipe\n"


def test_a_directory_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, target = tmp_path / "new", tmp_path / "target"
    for folder in (new, target):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    with monkeypatch.context() as context, pytest.raises(OSError, match="No space left"):
        rename = os.rename
        context.setattr(os, "rename", lambda old, to: fail() if old == new else rename(old, to))
        replace_directory(new, target)
    assert (target / "file").read_text() == "target"
    replace_directory(new, target)
    assert (target / "file").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\nfirst\nsecond")) == "first"
    assert first_line(KeyError()) == "KeyError"
