"""``mosa data build``: turn sources into a dataset folder of tokenizer, tokens and manifest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_mosa.config import DataSection
from megatron_mosa.data.encoder import Encoder
from megatron_mosa.data.hub import SourceInterruptedError
from megatron_mosa.data.left_out import describe_counts
from megatron_mosa.data.manifest import (
    MANIFEST_FILE,
    NO_SPECIAL_TOKENS,
    SPLITS,
    Manifest,
    end_of_document_id,
    load_manifest,
    read_manifest,
)
from megatron_mosa.data.shards import Shard, has_shards, join_shards, read_shards, write_shards
from megatron_mosa.data.sources import STDLIB, FileSource, Source, open_source, total_text_bytes
from megatron_mosa.data.tokenizer import (
    TOKENIZER_FILE,
    encoding_hash,
    load_tokenizer,
    load_tokenizer_and_path,
    named_end_of_document,
    tokenizer_hash,
    tokenizer_path,
    train_tokenizer,
    vocabulary_size,
)
from megatron_mosa.errors import UserError
from megatron_mosa.utils import counted, free_megabytes, load_json, progress, replace_directory, sync, write_atomically

INDEX_CACHE = "index_cache"

_FILES = {TOKENIZER_FILE, MANIFEST_FILE, INDEX_CACHE, *(f"{s}.{suffix}" for s in SPLITS for suffix in ("bin", "idx"))}
_LOCK = ".lock"
_REQUEST_FILE = "request.json"
_SHARE_FILE = "held_out_share"
_END_FILE = "end_of_document_id"
_END_OF_DOCUMENT = "end_of_document_token"
_LEAST_RAISED_SHARE = 1e-4  # each share reads all documents once more
_FORCE = "mosa data build CONFIG --force"
_PARALLELISM = "TOKENIZERS_PARALLELISM"  # read by the library at each call


def build_dataset(data: DataSection, *, force: bool = False) -> Manifest:
    """Build the dataset at ``data.path``, or return its manifest if it has already been built.

    The dataset is written to a folder beside ``data.path``, which is renamed once it is complete. An interrupted build
    leaves its finished shards there; the next build with the same settings continues from them, with the same result.
    Memory grows with the longest document and the number of files, not with the corpus; on disk the tokens take twice
    their space for a while. A source counts as changed if names or sizes of its files have changed; for the shards of
    an interrupted build, also if modification times or the first or last bytes have.

    Args:
        data: sources, tokenizer, split and path; settings that only training uses are ignored.
        force: replace another dataset, or an interrupted build that cannot be continued.

    Raises:
        UserError: a source or tokenizer cannot be read; the corpus or a split is empty; ``data.path`` holds other
            files, or (without ``force``) another dataset or another interrupted build; the disk is full or read-only.
    """
    started = time.monotonic()
    if data.path is None:
        raise UserError("data.path=null: a build writes one dataset (data.blend mixes built ones); set it to a folder")
    target = Path(os.path.realpath(Path(data.path).expanduser()))  # Path.resolve would raise for a loop of links
    if not target.name:
        raise UserError(f"data.path={data.path} is the root directory; set it to a new folder")
    if os.path.ismount(target):
        raise UserError(
            f"data.path={data.path} is a mount point, which a finished dataset cannot take the place of; set it to a "
            "folder inside of it"
        )
    marks = (MANIFEST_FILE, TOKENIZER_FILE)
    outers = (folder for folder in target.parents if all(os.path.isfile(folder / mark) for mark in marks))
    if (outer := next(outers, None)) is not None:
        raise UserError(f"data.path={data.path} is inside the dataset '{outer}'; set it to a folder beside it")
    partial = target.with_name(f".{target.name}.partial")
    sources = [
        open_source(source, data.text_field, streaming=data.streaming, timeout=data.stream_timeout)
        for source in data.sources
    ]
    for source in sources:
        if isinstance(source, FileSource) and source.would_read(target):
            raise UserError(
                f"data.path={data.path} is inside the source '{source.name}', and the next build would read the "
                "dataset's own files; set it to a folder outside of all sources"
            )
    _note_overlaps([source for source in sources if isinstance(source, FileSource)])
    request = _request(data, sources)
    unfinished = _recorded_request(partial, request)
    if _has_dataset(target) and not force and (unfinished is None or _differing(unfinished, request)):
        fix = f"choose another data.path, or replace it: {_FORCE}"
        _check_same_request(f"data.path={data.path} was built from", _built_request(target, request), request, fix)
        _remove_lock(target)
        print(f"{data.path} is up to date", file=sys.stderr)
        return read_manifest(target)
    os.environ[_PARALLELISM] = "true"  # the library turns it off once the process has forked
    with _disk_errors(target), _locked_folder(partial):
        shards = _shards_to_resume(partial, request, sources, force)
        if not (partial / MANIFEST_FILE).is_file():
            _write(data, request, sources, shards, partial)
        holds_more = (partial / _SHARE_FILE).is_file()
        _remove_files(partial, keep=_FILES | {_LOCK})  # which stays until another build would not find the folder
        sync(partial)
        replace_directory(partial, target)
        _remove_lock(target)
    manifest = read_manifest(target)
    first, *others = summary(data.path, manifest)
    if holds_more:
        others.append(
            f"  data.validation_fraction={data.validation_fraction} would have held out no document: a larger share is "
            "held out"
        )
    print("\n".join([f"Built {first}, in {time.monotonic() - started:.1f} s", *others]), file=sys.stderr)
    return manifest


def _note_overlaps(sources: Sequence[FileSource]) -> None:
    """Say which sources are read twice, which may be meant."""
    for number, source in enumerate(sources):
        for other in sources[:number]:
            if inner := source if other.contains(source) else other if source.contains(other) else None:
                outer = other if inner is source else source
                where = "named twice" if inner.name == outer.name else f"inside '{outer.name}'"
                print(f"data.sources: '{inner.name}' is {where}, so its documents are read twice", file=sys.stderr)


def summary(name: str, manifest: Manifest) -> list[str]:
    """Return lines that describe a dataset, and what its build left out or changed."""
    counts = {key: sum(manifest.splits[split][key] for split in SPLITS) for key in ("documents", "tokens")}
    parts = ", ".join(f"{manifest.splits[split]['tokens']:,} {split}" for split in SPLITS)
    lines = [
        f"{name}: {counted(counts['documents'], 'document')}, {counted(counts['tokens'], 'token')} ({parts}), "
        f"vocabulary {manifest.vocab_size:,}"
    ]
    requested = manifest.request.get("vocab_size")
    if requested is not None and manifest.vocab_size < requested:
        lines.append(f"  vocabulary below data.vocab_size={requested}: the text has no more pairs to merge")
    return lines + [f"  left out or changed: {count}" for count in describe_counts(manifest.left_out or {})]


def _request(data: DataSection, sources: Sequence[Source]) -> dict[str, Any]:
    """Return everything that the content of the dataset depends on, in JSON types."""
    trained = data.tokenizer is None
    path = tokenizer_path(data.tokenizer) if data.tokenizer is not None else None
    request = {
        "sources": [source.describe() for source in sources],
        "python": platform.python_version() if STDLIB in data.sources else None,
        "text_field": data.text_field,
        "tokenizer": data.tokenizer,
        "tokenizer_file_hash": tokenizer_hash(path) if path else None,
        "tokenizer_bytes": data.tokenizer_bytes if trained else None,
        "vocab_size": data.vocab_size if trained else None,
        "validation_fraction": data.validation_fraction,
    }
    if path is not None:  # files beside it name the token; otherwise the vocabulary alone decides
        tokenizer = load_tokenizer(str(path))
        request[_END_OF_DOCUMENT] = tokenizer.id_to_token(end_of_document_id(tokenizer, path))
    return request


def _recorded(request: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the request without the usual end-of-document token, as earlier versions did, for the same fingerprint."""
    with contextlib.suppress(UserError):  # the vocabulary has none of the usual ones
        usual = tokenizer.id_to_token(named_end_of_document(tokenizer))
        return {key: value for key, value in request.items() if key != _END_OF_DOCUMENT or value != usual}
    return request


def _built_request(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Return the request that a dataset was built from, with its end-of-document token if ``request`` has one."""
    manifest = load_manifest(folder)
    if _END_OF_DOCUMENT not in request or _END_OF_DOCUMENT in manifest.request:
        return manifest.request
    token = load_tokenizer(str(folder / TOKENIZER_FILE)).id_to_token(manifest.end_of_document_id)
    return {**manifest.request, _END_OF_DOCUMENT: token}


def _has_dataset(target: Path) -> bool:
    """Return whether there is a dataset at ``target``.

    Raises:
        UserError: there is something else, which a build must not replace.
    """
    if not os.path.lexists(target):
        return False
    if not target.is_dir():
        raise UserError(f"data.path={target} is a file; set it to a new folder")
    names = {entry.name for entry in target.iterdir()}
    foreign = sorted(names - _FILES - {_LOCK})
    if foreign or (names and MANIFEST_FILE not in names):
        problem = f"contains other files ({', '.join(foreign[:3])})" if foreign else f"has no {MANIFEST_FILE}"
        raise UserError(f"data.path={target} is not a dataset: it {problem}; choose another path or empty the folder")
    return bool(names)


def _differing(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Return the keys of a request whose values differ from an earlier one's, which may lack some."""
    differing = {key for key in new if old.get(key, new[key]) != new[key]}
    if new["tokenizer_file_hash"] is not None and old.get("tokenizer_file_hash") == new["tokenizer_file_hash"]:
        differing.discard("tokenizer")  # the same file, by another spelling of its path
    return differing


def _check_same_request(subject: str, old: dict[str, Any], new: dict[str, Any], fix: str) -> None:
    """Check that the settings recorded earlier equal the new ones; settings that were not recorded are ignored.

    Raises:
        UserError: they differ.
    """

    def described(key: str, request: dict[str, Any]) -> str:
        if key != "sources":
            return str(request.get(key))
        return ", ".join(
            f"{s['source']} ({counted(s['files'], 'file')}"
            + (f", {s['bytes']} bytes)" if s["bytes"] is not None else ")")
            for s in request.get(key, [])
        )

    def change(key: str) -> str:
        before, after = described(key, old), described(key, new)
        return f"{key}: {before} -> {after if after != before else 'as many, with other names or sizes'}"

    changes = [change(key) for key in sorted(_differing(old, new))]
    if changes:
        raise UserError(f"{subject} other settings ({'; '.join(changes)}); {fix}")


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn an OSError into a UserError. It comes from writing: reading raises UserError itself."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"could not write {error.filename or target}: {error.strerror}; make it writable, or set data.path to "
                "another folder"
            ) from error
        raise UserError(
            f"no space left while writing {target} ({free_megabytes(target)} MB free); free space and run the same "
            "command again, or set data.path to another disk"
        ) from error


@contextlib.contextmanager
def _locked_folder(partial: Path) -> Iterator[None]:
    """Create and lock the folder of a build; after an error, remove it unless the build can be continued from it.

    The kernel releases the lock when the process ends, so a killed build does not block the next one.
    """
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / _LOCK, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (partial / _LOCK).exists():  # the other build has just finished
                raise BlockingIOError
        except BlockingIOError:
            raise UserError(f"another process is building in {partial}; wait for it, or stop it") from None
        except OSError:
            pass  # the file system does not support locks
        try:
            yield
        except (UserError, OSError) as error:
            if not has_shards(partial) and not isinstance(error, SourceInterruptedError):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _remove_lock(target: Path) -> None:
    """Remove the lock of the build that wrote a dataset; one that was killed at its very end left it."""
    with contextlib.suppress(OSError):
        (target / _LOCK).unlink()


def _recorded_request(partial: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the request of an unfinished build; None: there is none. A manifest replaces it when all is written."""
    try:
        if (partial / MANIFEST_FILE).is_file():
            return _built_request(partial, request)
        recorded = load_json(partial / _REQUEST_FILE)
        return recorded if isinstance(recorded, dict) else None
    except (OSError, ValueError, UserError):
        return None


def _shards_to_resume(partial: Path, request: dict[str, Any], sources: Sequence[Source], force: bool) -> list[Shard]:
    """Return the finished shards of an interrupted build; if there is none, prepare the folder for a new build.

    Raises:
        UserError: the settings or sources have changed, and ``force`` is not given.
    """
    recorded = _recorded_request(partial, request)
    if recorded is not None and (not _differing(recorded, request) or has_shards(partial)):
        try:
            shards = read_shards(partial, sources)
            fix = f"restore them, or start over: {_FORCE}"
            _check_same_request("an interrupted build was started with", recorded, request, fix)
            return shards
        except UserError:
            if not force:
                raise
    _remove_files(partial, keep={_LOCK})
    write_atomically(partial / _REQUEST_FILE, json.dumps(request), durable=True)
    return []


def _write(
    data: DataSection, request: dict[str, Any], sources: Sequence[Source], done: Sequence[Shard], folder: Path
) -> None:
    """Write tokenizer, tokens and manifest, continuing from the shards in ``done``."""
    from megatron.core.datasets.indexed_dataset import DType  # slow to import

    file = folder / TOKENIZER_FILE
    if not file.is_file():
        _write_tokenizer(data, sources, file)
    tokenizer = load_tokenizer(str(file))
    end_id = _end_id(data, tokenizer, folder)
    vocab_size = vocabulary_size(tokenizer)
    dtype = DType.optimal_dtype(vocab_size)
    os.environ[_PARALLELISM] = "false"  # each core encodes its own batches
    shares = _held_out_shares(folder, data.validation_fraction)
    encoder = Encoder(tokenizer, end_id, dtype, next(shares))
    shards = write_shards(folder, sources, done, encoder, data.shard_bytes)
    while _holds_nothing_out(shards) and (share := next(shares, None)) is not None:
        shards = write_shards(folder, sources, [], replace(encoder, validation_fraction=share), data.shard_bytes)
    left_out = dict(sorted(sum((Counter(shard.left_out) for shard in shards), Counter[str]()).items()))
    try:
        _check_counts(data, shards, left_out)
    except UserError:
        _remove_files(folder, keep={_LOCK})  # other settings are needed, with which a build cannot continue from these
        raise
    manifest = Manifest(
        tokenizer_hash=tokenizer_hash(file),
        encoding_hash=encoding_hash(tokenizer),
        special_tokens=NO_SPECIAL_TOKENS,
        left_out=left_out,
        tokenizer_source=data.tokenizer or "trained on the sources",
        vocab_size=vocab_size,
        end_of_document_id=end_id,
        splits=join_shards(folder, shards, dtype),
        request=_recorded(request, tokenizer),
    )
    write_atomically(folder / MANIFEST_FILE, manifest.sealed().to_json(), durable=True)


def _write_tokenizer(data: DataSection, sources: Sequence[Source], file: Path) -> None:
    """Write the tokenizer, and before a given one the id of its end-of-document token, which later calls keep."""
    if data.tokenizer is None:
        tokenizer = train_tokenizer(_tokenizer_sample(sources, data.tokenizer_bytes), data.vocab_size)
    else:
        tokenizer, path = load_tokenizer_and_path(data.tokenizer)
        write_atomically(file.with_name(_END_FILE), str(end_of_document_id(tokenizer, path)), durable=True)
    write_atomically(file, tokenizer.to_str(pretty=True), durable=True)


def _end_id(data: DataSection, tokenizer: Tokenizer, folder: Path) -> int:
    record = folder / _END_FILE
    if record.is_file():
        return int(record.read_text(encoding="utf-8"))
    # A trained tokenizer, or a build begun by an earlier version, which took the usual name for those of the hub.
    return end_of_document_id(tokenizer, tokenizer_path(data.tokenizer) if data.tokenizer else None)


def _held_out_shares(folder: Path, wanted: float) -> Iterator[float]:
    """Yield the share of documents to hold out, then twice as much each time, up to a half.

    Of a few documents, a small share often holds out none. The share in use is recorded, so that an interrupted build
    continues with it.
    """
    record = folder / _SHARE_FILE
    share = float(record.read_text(encoding="utf-8")) if record.is_file() else wanted
    yield share
    while share < 0.5:
        share = min(max(2 * share, _LEAST_RAISED_SHARE), 0.5)
        _remove_files(folder, keep={_LOCK, _REQUEST_FILE, TOKENIZER_FILE, _END_FILE})
        write_atomically(record, str(share), durable=True)
        yield share


def _holds_nothing_out(shards: Sequence[Shard]) -> bool:
    train, validation = (sum(shard.splits[split]["documents"] for shard in shards) for split in SPLITS)
    return train > 1 and not validation


def _tokenizer_sample(sources: Sequence[Source], budget: int) -> Iterator[str]:
    """Yield ``budget`` bytes of text at most: the beginning of each source, in equal parts if all are long enough."""
    total = total_text_bytes(sources)
    with progress(None if total is None else min(budget, total), "training the tokenizer") as bar:
        for remaining, source in zip(range(len(sources), 0, -1), sources, strict=True):
            share = budget // remaining
            with closing(source.read()) as documents:
                for text, _ in documents:
                    content = text.encode()[:share]
                    yield content.decode(errors="ignore")
                    bar.update(len(content))
                    share -= len(content)
                    budget -= len(content)
                    if share <= 0:
                        break


def _check_counts(data: DataSection, shards: Sequence[Shard], left_out: Mapping[str, int]) -> None:
    counts = {split: sum(shard.splits[split]["documents"] for shard in shards) for split in SPLITS}
    documents = sum(counts.values())
    if documents == 0:
        found = f", only {', '.join(describe_counts(left_out))}" if left_out else ": they have no files or rows"
        raise UserError(
            f"data.sources={list(data.sources)} contain no text{found}; name UTF-8 text, JSON Lines or Parquet"
        )
    for name, count in counts.items():
        if count == 0:
            change = "raise" if name == "validation" else "lower"
            raise UserError(
                f"the {name} split is empty: data.validation_fraction={data.validation_fraction} leaves it none of "
                f"{counted(documents, 'document')}; {change} data.validation_fraction or add "
                "documents (a text file is one)"
            )


def _remove_files(folder: Path, keep: set[str]) -> None:
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink()
