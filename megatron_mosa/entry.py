"""Setup shared by all entry points: errors as one line, exit codes, garbage collection and silenced warnings."""

from __future__ import annotations

import errno
import gc
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from megatron_mosa.errors import RunError, UnrecoverableError, UserError
from megatron_mosa.exit_codes import DONE, FAILED, GAVE_UP, INTERRUPTED, USAGE_ERROR

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType


def keep_freed_memory() -> None:
    """Make glibc keep freed memory of large tensors for reuse; with another C library this does nothing.

    By default the memory returns to the kernel. A program that reads a model one tensor at a time then faults in every
    page anew, which can cost more than reading the file.
    """
    import ctypes  # as little as possible is imported before Ctrl-C is handled

    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: allocate large blocks from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-8, 1)  # M_ARENA_MAX: share one heap among all threads


def raise_gc_threshold() -> None:
    """Run Python's garbage collector every 50,000 new objects instead of every 700, for short-lived commands.

    Importing torch, Megatron-core and DeepSpeed creates half a million objects that stay alive. By default the
    collector scans them repeatedly during the imports, which takes a fifth of the import time.
    """
    gc.set_threshold(50_000, 20, 20)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Make the imports of a training process quicker.

    The garbage collector is off, and what was imported is excluded from it for good; it resumes afterwards, so that
    reference cycles do not keep tensors of past steps alive for long.

    Functions that are decorated with torch.compile, as in Megatron-core, are compiled when they are first called, if
    ever. The decorator loads the compiler, which takes as long as torch itself.
    """
    import torch  # as little as possible is imported before Ctrl-C is handled

    before, compile_now = gc.get_threshold(), torch.compile
    gc.set_threshold(0)
    torch.compile = partial(_compile_when_called, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now
        gc.freeze()
        gc.set_threshold(*before)


def _compile_when_called(compile_now: Callable[..., Any], model: Any = None, **options: Any) -> Any:
    if model is None:
        return partial(_compile_when_called, compile_now, **options)
    compiled: list[Callable[..., Any]] = []

    @wraps(model)
    def call(*arguments: Any, **named: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():  # the caller
            return model(*arguments, **named)
        if not compiled:
            compiled.append(compile_now(model, **options))
        return compiled[0](*arguments, **named)

    return call


def _interrupts_noted() -> list[int]:
    """Return a list to which each SIGINT will be added; the first raises KeyboardInterrupt, the second exits.

    A SIGINT that is ignored, as in the background of a script, or handled otherwise already, stays so.
    """
    noted: list[int] = []
    terminal = 2
    with suppress(OSError):  # it is closed
        terminal = os.dup(2)  # while a program imports quietly, 2 itself is something else

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 1:
            os._exit(INTERRUPTED)
        if _is_importing(frame):  # libraries catch whatever their imports raise, and would go on
            with suppress(OSError):
                os.write(terminal, b"interrupted\n")
            os._exit(INTERRUPTED)
        sys.unraisablehook = lambda _: None  # finalizers that the interruption hits have nothing to say
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, note)
    return noted


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether a frame is inside an import; a look at a package's version also runs code of importlib."""
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load" and frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


_OF_OTHERS = (
    "config.json", "grid.json", "manifest.json", "metadata.json", "model.safetensors.index.json", "request.json",
    "skip_steps.json", "status.json", "tokenizer.json", "tokenizer_config.json", "wandb.json",
)  # fmt: skip
"""Names of files that an option must not replace."""
_NO_RESULTS = (".bin", ".distcp", ".idx", ".jsonl", ".parquet", ".safetensors", ".yaml", ".yml")


def check_output(option: str, path: Path | None, *, is_directory: bool = False, suffix: str = "") -> None:
    """Check that the file or directory of an option can be written, before anything is computed for it.

    What writes it makes missing parent directories.

    Args:
        suffix: what the name of a file must end in, unless it is a device.

    Raises:
        UserError: it cannot, or has another name.
    """
    if path is None:
        return
    from megatron_mosa.utils import creation_problem  # as little as possible is imported before Ctrl-C is handled

    if suffix and path.suffix != suffix and path.parts[:2] != ("/", "dev"):
        raise UserError(f"{option} must be a file name that ends in {suffix}, got {path}")
    what = "directory" if is_directory else "file"
    if os.path.lexists(path) and os.path.isdir(path) is not is_directory:
        problem = f"is a {'file' if is_directory else 'directory'}"
    elif not is_directory and (path.name in _OF_OTHERS or path.suffix in _NO_RESULTS) and os.path.isfile(path):
        problem = "would replace a file of a run, a dataset or a model"
    elif not is_directory and os.path.exists(path):
        is_file = os.path.isfile(path) or os.path.realpath(path).startswith("/dev/")  # a pipe would be waited for
        why = "it is not writable" if is_file else "it is not a regular file"
        problem = None if is_file and os.access(path, os.W_OK) else f"cannot be written: {why}"
    else:
        why = creation_problem(path)
        problem = why and f"cannot be written: {why}"
    if problem:
        raise UserError(f"{option}={path} {problem}; give a {what} in a writable directory")


_NEVER_USABLE = (errno.ENAMETOOLONG, errno.ELOOP)
_ENVIRONMENT = (
    *(*_NEVER_USABLE, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENXIO, errno.EMFILE, errno.ENFILE, errno.ESTALE),
)
"""Errors of the file system that say nothing about this program."""


def _flush_output() -> None:
    """Write what is left of the output while a full disk can still be reported; a closed pipe has seen enough."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()


def _output_is_closed() -> bool:
    """Return whether whoever read standard output has gone, as head does when it has seen enough."""
    import select

    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_output() -> None:
    """Discard what is left of the output, at which the interpreter would fail again at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)


def exit_code_of(error: Exception) -> int:
    """Return the exit code of a program that ended with ``error``."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in _NEVER_USABLE):
        return USAGE_ERROR
    return GAVE_UP if isinstance(error, UnrecoverableError) else FAILED


SECONDS_FOR_THE_FIRST = 3.0
_FEWEST_COLUMNS = 20

_joined: list[tuple[int, Callable[[str], bool]]] = []
_reported: list[Exception] = []
"""The last error that ``report_error`` has dealt with."""


@contextmanager
def joined(rank: int, claim: Callable[[str], bool]) -> Iterator[None]:
    """Have the ranks of a run, which this process has joined, agree on whose error is printed.

    Args:
        rank: this process's rank.
        claim: called with the line of an error that ends this rank; returns whether no other rank has failed before.
    """
    _joined.append((rank, claim))
    try:
        yield
    finally:
        _joined.clear()


def report_error(error: Exception) -> bool:
    """Print the line of an error that a user sees as one line, unless it has been printed here or by another rank.

    Returns:
        Whether it is such an error.
    """
    if (line := _line_of(error)) is None:
        return False
    if error in _reported:
        return True
    _reported[:] = [error]
    if _joined:
        rank, claim = _joined[-1]
        if not getattr(error, "of_all_ranks", False) and not line.startswith(f"rank {rank}"):
            line = f"rank {rank}: {line}"
        if not claim(line):
            return True
    elif not _is_first_of_node():
        _wait_for_the_first(exit_code_of(error))
    with suppress(OSError):  # it may be on the same full disk
        print(f"error: {_printable(line)}", file=sys.stderr, flush=True)
    return True


def _printable(line: str) -> str:
    """Return a line that stays one, and says nothing to the terminal, whatever the names of files contain."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)


def _line_of(error: Exception) -> str | None:
    if isinstance(error, (UserError, RunError)):
        return str(error)
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
        from megatron_mosa.utils import file_problem  # as little as possible is imported before Ctrl-C is handled

        return file_problem(error, "the output")
    return None


def _is_first_of_node() -> bool:
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return local_rank == "0" or not local_rank.isdecimal()  # where it is not a number, it is itself the error


def _wait_for_the_first(code: int) -> None:
    """Give the first rank of this node some seconds before another one reports an error and exits with ``code``.

    If it is the first rank's error, too, the launcher ends this process meanwhile, and the error is reported once.
    Otherwise only this rank knows it. If this rank ended at once, the launcher might end the first one before it has
    said anything.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(code)  # the code of the error: launchers report those of all ranks

    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, end)
    time.sleep(SECONDS_FOR_THE_FIRST)


def _require_folder() -> None:
    """Raise a UserError in a directory that has been removed, where libraries end the process in words of their own."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current directory has been removed; change to another one") from None


def run(program: Callable[[], object]) -> int:
    """Run a program and return its exit code (``exit_codes``): its own return value if that is an integer.

    A UserError or RunError prints one line; so do Ctrl-C, and a file system that is full or forbids something. Any
    other exception is a bug and keeps its traceback.
    """
    interrupts = _interrupts_noted()
    columns = os.environ.get("COLUMNS", "")
    if not (columns.isascii() and columns.isdecimal() and len(columns) <= 4 and int(columns) >= _FEWEST_COLUMNS):
        os.environ.pop("COLUMNS", None)  # tables of no width, or of one that fills the memory, show nothing
    for stream in (sys.stdout, sys.stderr):  # a character missing from the locale must not end a command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # torch prints pages of its own C++ frames around errors that our line explains; read when torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Megatron-core warns at import about every absent optional package; the README lists what is optional.
    warnings.filterwarnings("ignore", module=r"(megatron\.core|deepspeed|torch)\b.*")
    is_first = _is_first_of_node()
    try:
        _require_folder()
        from megatron_mosa.utils import (
            drop_known_noise,  # here, so that Ctrl-C during its imports ends in one line, too
        )

        drop_known_noise()
        code = program()
        _flush_output()
    except (UserError, RunError) as error:
        report_error(error)
        return exit_code_of(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            _drop_output()
            return FAILED
        if error.errno not in _ENVIRONMENT:
            raise
        try:
            _flush_output()
        except OSError:
            _drop_output()
        report_error(error)
        return exit_code_of(error)
    except BaseException:
        if not interrupts:
            raise
        exec("")  # Python notes an interruption inside an exec, and would end by the signal; this clears the note
        if is_first:  # whatever the signal has become on its way, as in a library that catches what its imports raise
            print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        gc.freeze()  # or the last collection, at exit, would scan all modules for a second
    if interrupts and code == INTERRUPTED and is_first:  # Typer has turned it into an exit code
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else DONE
