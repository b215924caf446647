"""``mosa data build``: sources to a folder of tokenizer.json, train and validation .bin/.idx, and manifest.json."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_mosa.config.schema import DataSection
from megatron_mosa.data.manifest import MANIFEST_FILE, SPLITS, Manifest, load_manifest, read_manifest
from megatron_mosa.data.sources import STDLIB, describe_source, iter_documents, text_bytes
from megatron_mosa.data.tokenizer import (
    TOKENIZER_FILE,
    end_of_document_id,
    load_tokenizer,
    tokenizer_hash,
    tokenizer_path,
    train_tokenizer,
    vocabulary_size,
)
from megatron_mosa.errors import UserError

INDEX_CACHE = "index_cache"

_FILES = {TOKENIZER_FILE, MANIFEST_FILE, INDEX_CACHE, *(f"{s}.{suffix}" for s in SPLITS for suffix in ("bin", "idx"))}
_BATCH_CHARACTERS = 1 << 20  # enough documents to keep every core busy; encodings take some 100 bytes a token
_LOCK = ".lock"


def build_dataset(data: DataSection, *, force: bool = False) -> Manifest:
    """Build the dataset at ``data.path``, or return the manifest of the one that is there already.

    The folder appears complete or not at all: it is written beside its place and renamed. Memory grows with the
    number of documents (some 100 bytes each) and the longest document, not with the corpus. A source counts as
    changed when the names or sizes of its files changed.

    Args:
        data: where the text is and how it is cut; sequence_length and what follows are not used here.
        force: rebuild, whatever dataset is there.

    Raises:
        UserError: a source or tokenizer that cannot be read, an empty corpus or split, another dataset at
            ``data.path`` (without ``force``), a folder that is no dataset, a full or read-only disk.
    """
    target = Path(data.path).expanduser().resolve()
    request = _request(data)
    if _occupied(target) and not force:
        _compare(data.path, load_manifest(target).request, request)
        print(f"{data.path}: up to date", file=sys.stderr)
        return read_manifest(target)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the library turns it off once the process has forked
    with _disk_errors(target), _partial_folder(target) as partial:
        manifest = _write(data, request, partial)
        _move_into_place(partial, target)
    return manifest


def in_validation(text: str, validation_fraction: float) -> bool:
    """Whether a document is held out: a function of its text alone, so that copies never straddle the splits."""
    head = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(head, "big") / 2**64 < validation_fraction


def _request(data: DataSection) -> dict[str, Any]:
    """What the dataset depends on, in JSON types."""
    trained = data.tokenizer is None
    path = tokenizer_path(data.tokenizer) if data.tokenizer is not None else None
    return {
        "sources": [describe_source(source) for source in data.sources],
        "python": platform.python_version() if STDLIB in data.sources else None,
        "text_field": data.text_field,
        "tokenizer": data.tokenizer,
        "tokenizer_file_hash": tokenizer_hash(path) if path else None,
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


def _compare(path: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    def shown(key: str, request: dict[str, Any]) -> str:
        if key != "sources":
            return str(request.get(key))
        return ", ".join(f"{s['source']} ({s['files']} files, {s['bytes']} bytes)" for s in request.get(key, []))

    changes = [f"{key}: {shown(key, old)} -> {shown(key, new)}" for key in sorted(new) if old.get(key) != new[key]]
    if changes:
        raise UserError(
            f"data.path={path} holds a dataset built from other settings ({'; '.join(changes)}); choose another "
            "data.path, or replace it: mosa data build CONFIG --force"
        )


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
            f"no space left while writing {target}; {free} MB free; free space or set data.path to another disk"
        ) from error


@contextlib.contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` for this process alone, removed at the end unless it was moved away.

    A lock tells a build that goes on from what a killed one left; the kernel drops it with its process.
    """
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is building {target} just now; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        try:
            for left_over in partial.iterdir():
                if left_over.name != _LOCK:
                    left_over.unlink()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write(data: DataSection, request: dict[str, Any], folder: Path) -> Manifest:
    total = text_bytes(data.sources)
    if data.tokenizer is None:
        texts = iter_documents(data.sources, data.text_field)
        tokenizer = train_tokenizer(_counted(texts, total, "training the tokenizer"), data.vocab_size)
        end_id = end_of_document_id(tokenizer)
    else:
        tokenizer = load_tokenizer(data.tokenizer)
        end_id = end_of_document_id(tokenizer, tokenizer_path(data.tokenizer))
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    texts = iter_documents(data.sources, data.text_field)
    vocab_size = vocabulary_size(tokenizer)
    splits = _write_splits(tokenizer, texts, total, end_id, vocab_size, data.validation_fraction, folder)
    _check_counts(data, splits)
    manifest = Manifest(
        tokenizer_hash=tokenizer_hash(folder / TOKENIZER_FILE),
        tokenizer_source=data.tokenizer or "trained on the sources",
        vocab_size=vocab_size,
        end_of_document_id=end_id,
        splits=splits,
        request=request,
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _write_splits(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    total: int | None,
    end_id: int,
    vocab_size: int,
    validation_fraction: float,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Tokenize every document into the .bin/.idx of its split; return what the manifest says of them."""
    dtype = DType.optimal_dtype(vocab_size)
    builders = {split: IndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=dtype) for split in SPLITS}
    splits: dict[str, dict[str, Any]] = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    start, tokens = time.monotonic(), 0
    with _progress(total, "tokenizing") as bar:
        for batch in _batches(texts):
            for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True):
                split = "validation" if in_validation(text, validation_fraction) else "train"
                ids = np.asarray([*encoding.ids, end_id], dtype=np.int64)  # [tokens of the document + 1]
                builders[split].add_document(torch.from_numpy(ids), [ids.size])
                splits[split]["documents"] += 1
                splits[split]["tokens"] += ids.size
                tokens += ids.size
            documents = sum(counts["documents"] for counts in splits.values())
            rate = tokens / max(time.monotonic() - start, 1e-9)
            bar.set_postfix_str(f"{documents} documents, {rate:,.0f} tokens/s", refresh=False)
            bar.update(sum(len(text.encode()) for text in batch))
    for split, builder in builders.items():
        builder.finalize(str(folder / f"{split}.idx"))
        with open(folder / f"{split}.bin", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        sizes = {f"{suffix}_bytes": (folder / f"{split}.{suffix}").stat().st_size for suffix in ("bin", "idx")}
        splits[split] |= {**sizes, "bin_sha256": digest}
    return splits


def _check_counts(data: DataSection, splits: dict[str, dict[str, Any]]) -> None:
    documents = sum(split["documents"] for split in splits.values())
    if documents == 0:
        raise UserError(f"data.sources={list(data.sources)} hold no text: every file or row is empty; name others")
    for name, split in splits.items():
        if split["documents"] == 0:
            change = "raise" if name == "validation" else "lower"
            raise UserError(
                f"the {name} split is empty: data.validation_fraction={data.validation_fraction} left it none of the "
                f"{documents} documents; {change} data.validation_fraction or give more documents (a text file is one)"
            )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _progress(total: int | None, description: str) -> Any:
    """A bar over bytes of text on stderr; with a known total it shows the time left."""
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log file needs no animation
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, mininterval=interval)


def _counted(texts: Iterable[str], total: int | None, description: str) -> Iterator[str]:
    with _progress(total, description) as bar:
        for text in texts:
            yield text
            bar.update(len(text.encode()))


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename the finished folder to ``target``; the dataset that was there goes only when the new one stands."""
    (partial / _LOCK).unlink()
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    replaced = target.is_dir()
    if replaced:
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        if replaced:
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
