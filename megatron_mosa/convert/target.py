"""Check the target folder of a conversion, and create it atomically."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_mosa.convert.locate import Kind, detect_kind, torch_dist_iteration
from megatron_mosa.errors import StorageError, UserError
from megatron_mosa.utils import creation_problem, is_plain, replace_directory, sync

_REPLACEABLE = (Kind.MOSA, Kind.HUGGING_FACE, Kind.TORCH_DIST, Kind.STATE_DICT)  # kinds that conversions write


def check_target(target: Path, source: Path, *, force: bool) -> None:
    """Refuse a target that exists or cannot be written to.

    Args:
        force: allow replacing an existing model; nothing else may be replaced, nor folders beside the model's own.

    Raises:
        UserError: names the target and the fix.
    """
    resolved, source_path = (Path(os.path.realpath(path)) for path in (target, source))
    if resolved == source_path or resolved in source_path.parents or source_path in resolved.parents:
        raise UserError(f"OUT={target} is inside the source '{source}' or contains it; choose a separate folder")
    if not is_plain(str(target)):
        raise UserError(f"OUT={target} must be UTF-8 text without control characters; choose another name")
    if (problem := creation_problem(resolved.parent)) is not None:
        raise UserError(f"OUT={target}: {problem}; choose a new folder in a writable directory")
    if not os.path.lexists(target):
        return
    objection = _objection(target)
    if not force:
        fix = "choose another folder" + (", or pass --force to replace it" if objection is None else "")
        raise UserError(f"OUT={target} already exists; {fix}")
    if objection is not None:
        raise UserError(f"OUT={target} {objection}, and --force replaces only model folders; choose another folder")


def _objection(target: Path) -> str | None:
    """Return why ``--force`` must not replace what stands at a target, or None."""
    kind = detect_kind(target)
    has_weights = kind is not Kind.HUGGING_FACE or any(target.glob("*.safetensors"))  # others have a config.json, too
    if target.is_symlink() or kind not in _REPLACEABLE or not has_weights:
        return "is not a model folder"
    own = {"state" if kind is Kind.MOSA else "", "__pycache__"}
    if kind is Kind.TORCH_DIST and (iteration := torch_dist_iteration(target)) is not None:
        own.add(iteration.name)
    others = sorted(path.name for path in target.iterdir() if path.is_dir() and path.name not in own)
    return f"also holds other folders ({', '.join(others[:3])})" if others else None


@contextmanager
def atomic_folder(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield a temporary folder next to ``target``; rename it to ``target`` on success, and remove it on failure.

    Creates missing parents of ``target``. An existing model at ``target`` stays in place until the new one is complete.

    Args:
        target: that ``check_target`` has accepted.
        force: replace what is there.

    Raises:
        UserError: another conversion writes to ``target``, or has done so since it was checked.
        StorageError: writing failed.
    """
    final = Path(os.path.realpath(target))
    writing = final.with_name(f".writing-{final.name}")
    missing = [folder for folder in final.parents if not folder.exists()]  # deepest first
    claim = None
    try:
        claim = _claim(writing, target)
        yield writing
        for entry in (*writing.rglob("*"), writing):
            sync(entry)
        if not force and os.path.lexists(final):
            raise UserError(f"OUT={target} has been created by something else meanwhile; choose another folder")
        replace_directory(writing, final)
        os.close(claim)
        claim = None  # from now on, another conversion may write there
    except (OSError, StorageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"could not write to OUT={target}: {reason}; free disk space or choose another folder"
        ) from None
    finally:
        if claim is not None:
            shutil.rmtree(writing, ignore_errors=True)
            os.close(claim)
        with suppress(OSError):  # not empty, or never created
            for folder in missing:
                folder.rmdir()


def _claim(writing: Path, target: Path) -> int:
    """Create an empty folder and lock it, as far as its file system has locks; return the descriptor of the lock.

    Raises:
        UserError: another process holds the lock.
    """
    while True:
        writing.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(writing, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"another conversion is writing to OUT={target}; wait for it, or choose another folder"
            ) from None
        except OSError:  # no locks here
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(writing)):
                break
        os.close(descriptor)  # the other one has finished, and renamed its folder
    for entry in writing.iterdir():  # left by a process that was killed
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    return descriptor
