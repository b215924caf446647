"""``mosa data build``: sources to a folder of tokenizer.json, train and validation .bin/.idx, and manifest.json."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import DType

from megatron_mosa.config import DataSection
from megatron_mosa.data.encoder import Encoder
from megatron_mosa.data.hub import Interrupted
from megatron_mosa.data.manifest import (
    MANIFEST_FILE,
    NO_SPECIAL_TOKENS,
    SPLITS,
    Manifest,
    load_manifest,
    read_manifest,
)
from megatron_mosa.data.shards import Shard, has_shards, join_shards, read_shards, write_shards
from megatron_mosa.data.sources import STDLIB, Source, open_source
from megatron_mosa.data.tokenizer import (
    TOKENIZER_FILE,
    encoding_hash,
    end_of_document_id,
    load_tokenizer,
    tokenizer_hash,
    tokenizer_path,
    train_tokenizer,
    vocabulary_size,
)
from megatron_mosa.errors import UserError
from megatron_mosa.utils import progress, replace_directory, sync, write_atomically

INDEX_CACHE = "index_cache"

_FILES = {TOKENIZER_FILE, MANIFEST_FILE, INDEX_CACHE, *(f"{s}.{suffix}" for s in SPLITS for suffix in ("bin", "idx"))}
_LOCK = ".lock"
_REQUEST_FILE = "request.json"
_FORCE = "mosa data build CONFIG --force"
_PARALLELISM = "TOKENIZERS_PARALLELISM"  # read by the library at each call


def build_dataset(data: DataSection, *, force: bool = False) -> Manifest:
    """Build the dataset at ``data.path``, or return the manifest of the one that is there already.

    The folder appears complete or not at all: it is written beside its place and renamed. A build that was
    interrupted leaves its finished shards there, and the next one with the same settings goes on from them to the
    same bytes. Memory grows with the longest document and the number of files, not with the corpus; on the disk the
    tokens lie twice for a while. A source counts as changed when the names or sizes of its files changed, and for the
    shards of an interrupted build also when their time of change or their ends did.

    Args:
        data: where the text is and how it is cut; sequence_length and what is only for training are not used here.
        force: replace whatever is in the way: another dataset, or an interrupted build that cannot go on.

    Raises:
        UserError: a source or tokenizer that cannot be read, an empty corpus or split, another dataset or another
            interrupted build at ``data.path`` (without ``force``), a folder that is no dataset, a full or read-only
            disk.
    """
    if data.path is None:
        raise UserError("data.path=null: a build writes one dataset (data.blend mixes built ones); name its folder")
    target = Path(data.path).expanduser().resolve()
    partial = target.with_name(f".{target.name}.partial")
    sources = [
        open_source(source, data.text_field, streaming=data.streaming, timeout=data.stream_timeout)
        for source in data.sources
    ]
    request = _request(data, sources)
    if _occupied(target) and not force and _started(partial) != request:
        fix = f"choose another data.path, or replace it: {_FORCE}"
        _compare(f"data.path={data.path} holds a dataset built from", load_manifest(target).request, request, fix)
        print(f"{data.path}: up to date", file=sys.stderr)
        return read_manifest(target)
    os.environ[_PARALLELISM] = "true"  # the library turns it off once the process has forked
    with _disk_errors(target), _partial_folder(partial):
        shards = _resume(partial, request, sources, force)
        if not (partial / MANIFEST_FILE).is_file():
            _write(data, request, sources, shards, partial)
        _move_into_place(partial, target)
    manifest = read_manifest(target)
    print("\n".join(summary(data.path, manifest)), file=sys.stderr)
    return manifest


def summary(name: str, manifest: Manifest) -> list[str]:
    """What a dataset holds, and what its build left out or changed, as lines for a person."""
    counts = {key: sum(manifest.splits[split][key] for split in SPLITS) for key in ("documents", "tokens")}
    parts = ", ".join(f"{manifest.splits[split]['tokens']:,} {split}" for split in SPLITS)
    lines = [
        f"{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens ({parts}), "
        f"vocabulary {manifest.vocab_size:,}"
    ]
    asked = manifest.request.get("vocab_size")
    if asked is not None and manifest.vocab_size < asked:
        lines.append(f"  the vocabulary is smaller than data.vocab_size={asked}: the text has no more pairs to merge")
    return lines + [f"  left out or changed: {count:,} {what}" for what, count in (manifest.left_out or {}).items()]


def _request(data: DataSection, sources: Sequence[Source]) -> dict[str, Any]:
    """What the dataset depends on, in JSON types."""
    trained = data.tokenizer is None
    path = tokenizer_path(data.tokenizer) if data.tokenizer is not None else None
    return {
        "sources": [source.describe() for source in sources],
        "python": platform.python_version() if STDLIB in data.sources else None,
        "text_field": data.text_field,
        "tokenizer": data.tokenizer,
        "tokenizer_file_hash": tokenizer_hash(path) if path else None,
        "tokenizer_bytes": data.tokenizer_bytes if trained else None,
        "vocab_size": data.vocab_size if trained else None,
        "validation_fraction": data.validation_fraction,
    }


def _occupied(target: Path) -> bool:
    """Whether a dataset is at ``target``; refuse a place whose content is not ours to replace."""
    if not os.path.lexists(target):
        return False
    if not target.is_dir():
        raise UserError(f"data.path={target} is a file; give the name of a new folder")
    names = {entry.name for entry in target.iterdir()}
    foreign = sorted(names - _FILES)
    if foreign or (names and MANIFEST_FILE not in names):
        what = f"holds other files ({', '.join(foreign[:3])})" if foreign else f"has no {MANIFEST_FILE}"
        raise UserError(f"data.path={target} is no dataset folder: it {what}; choose another path or empty the folder")
    return bool(names)


def _compare(what: str, old: dict[str, Any], new: dict[str, Any], fix: str) -> None:
    """Refuse other settings than those of ``what``; a setting that its time did not know cannot differ."""

    def shown(key: str, request: dict[str, Any]) -> str:
        if key != "sources":
            return str(request.get(key))
        return ", ".join(
            f"{s['source']} ({s['files']} files" + (f", {s['bytes']} bytes)" if s["bytes"] is not None else ")")
            for s in request.get(key, [])
        )

    changes = [
        f"{key}: {shown(key, old)} -> {shown(key, new)}" for key in sorted(new) if old.get(key, new[key]) != new[key]
    ]
    if changes:
        raise UserError(f"{what} other settings ({'; '.join(changes)}); {fix}")


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Reading turns its own errors into UserError; what is left comes from writing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"cannot write {error.filename or target}: {error.strerror}; make it writable, or set data.path to "
                "another folder"
            ) from error
        existing = next(folder for folder in target.parents if folder.exists())
        free = shutil.disk_usage(existing).free >> 20
        raise UserError(
            f"no space left while writing {target}; {free} MB free; free space and run the same command again, or set "
            "data.path to another disk"
        ) from error


@contextlib.contextmanager
def _partial_folder(partial: Path) -> Iterator[None]:
    """The folder of an unfinished build, for this process alone; it stays when there is something to go on from.

    A lock tells a build that goes on from what a killed one left; the kernel drops it with its process.
    """
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / _LOCK, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is building in {partial} just now; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        except (UserError, OSError) as error:
            if not has_shards(partial) and not isinstance(error, Interrupted):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _started(partial: Path) -> dict[str, Any] | None:
    """The request of the build in a folder; when all is done but the move, the manifest has it."""
    try:
        if (partial / MANIFEST_FILE).is_file():
            return load_manifest(partial).request
        return json.loads((partial / _REQUEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, UserError):
        return None


def _resume(partial: Path, request: dict[str, Any], sources: Sequence[Source], force: bool) -> list[Shard]:
    """The shards to go on from; without any, the folder is made ready for a new build."""
    started = _started(partial)
    if started is not None and (started == request or has_shards(partial)):
        try:
            shards = read_shards(partial, sources)
            fix = f"restore them, or start anew: {_FORCE}"
            _compare("an interrupted build was started with", started, request, fix)
            return shards
        except UserError:
            if not force:
                raise
    _remove(partial, keep={_LOCK})
    write_atomically(partial / _REQUEST_FILE, json.dumps(request), durable=True)
    return []


def _write(
    data: DataSection, request: dict[str, Any], sources: Sequence[Source], done: Sequence[Shard], folder: Path
) -> None:
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        if data.tokenizer is None:
            tokenizer = train_tokenizer(_sample(sources, data.tokenizer_bytes), data.vocab_size)
        else:
            tokenizer = load_tokenizer(data.tokenizer)
        write_atomically(file, tokenizer.to_str(pretty=True), durable=True)
    tokenizer = load_tokenizer(str(file))
    end_id = end_of_document_id(tokenizer, tokenizer_path(data.tokenizer) if data.tokenizer else None)
    vocab_size = vocabulary_size(tokenizer)
    dtype = DType.optimal_dtype(vocab_size)
    encoder = Encoder(tokenizer, end_id, dtype, data.validation_fraction)
    os.environ[_PARALLELISM] = "false"  # each core encodes documents of its own
    shards = write_shards(folder, sources, done, encoder, data.shard_bytes)
    try:
        _check_counts(data, shards)
    except UserError:
        _remove(folder, keep={_LOCK})  # nothing to go on from: other settings are needed
        raise
    left_out = sum((Counter(shard.left_out) for shard in shards), Counter[str]())
    manifest = Manifest(
        tokenizer_hash=tokenizer_hash(file),
        encoding_hash=encoding_hash(tokenizer),
        special_tokens=NO_SPECIAL_TOKENS,
        left_out=dict(sorted(left_out.items())),
        tokenizer_source=data.tokenizer or "trained on the sources",
        vocab_size=vocab_size,
        end_of_document_id=end_id,
        splits=join_shards(folder, shards, dtype),
        request=request,
    )
    write_atomically(folder / MANIFEST_FILE, manifest.sealed().to_json(), durable=True)


def _sample(sources: Sequence[Source], budget: int) -> Iterator[str]:
    """At most ``budget`` bytes for the tokenizer: the beginnings of all sources, of equal size where they have it."""
    sizes = [source.text_bytes() for source in sources]
    total = None if None in sizes else min(budget, sum(size or 0 for size in sizes))
    with progress(total, "training the tokenizer") as bar:
        for left, source in zip(range(len(sources), 0, -1), sources, strict=True):
            share = budget // left
            with closing(source.read()) as documents:
                for text, _ in documents:
                    content = text.encode()[:share]
                    yield content.decode(errors="ignore")
                    bar.update(len(content))
                    share -= len(content)
                    budget -= len(content)
                    if share <= 0:
                        break


def _check_counts(data: DataSection, shards: Sequence[Shard]) -> None:
    counts = {split: sum(shard.splits[split]["documents"] for shard in shards) for split in SPLITS}
    documents = sum(counts.values())
    if documents == 0:
        raise UserError(f"data.sources={list(data.sources)} hold no text: every file or row is empty; name others")
    for name, count in counts.items():
        if count == 0:
            change = "raise" if name == "validation" else "lower"
            raise UserError(
                f"the {name} split is empty: data.validation_fraction={data.validation_fraction} left it none of the "
                f"{documents} documents; {change} data.validation_fraction or give more documents (a text file is one)"
            )


def _remove(folder: Path, keep: set[str]) -> None:
    for file in folder.iterdir():
        if file.name not in keep:
            file.unlink()


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename the finished folder to ``target``; the dataset that was there goes only when the new one stands."""
    _remove(partial, keep=_FILES)
    sync(partial)
    replace_directory(partial, target)
