"""The finished parts of a build: written one after the other, checked when the build goes on, joined at the end."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import struct
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_mosa.data.encoder import Encoded, Encoder
from megatron_mosa.data.hashing import file_sha256
from megatron_mosa.data.manifest import SPLITS
from megatron_mosa.data.sources import Position, Source
from megatron_mosa.errors import UserError
from megatron_mosa.utils import progress, sync, write_atomically

_BATCH_CHARACTERS = 1 << 18  # that a thread encodes at once; encodings take some 100 bytes a token
_COPY = 1 << 24  # bytes
_INDEX_HEAD = 18  # bytes before the counts in an .idx: magic, version, data type; one for all files of a type


class _Batch(NamedTuple):
    """Documents of a source, one after the other."""

    documents: list[Encoded]
    last: Position | None  # the place behind them
    left_out: Counter[str]  # of the source, from its beginning to there


_Waiting = tuple[Future[list[Encoded]], Position | None, Counter[str]]  # a batch whose documents are being encoded


@dataclass(frozen=True)
class Shard:
    """The record of a finished shard: the documents of one source between two places, tokenized."""

    number: int
    source: int  # its number in data.sources
    name: str  # of the source
    first: Position | None
    last: Position | None
    complete: bool  # the source ends here
    state: str  # of what was read, to see whether it changed since
    text_bytes: int
    splits: dict[str, dict[str, int]]  # documents, tokens, bin_bytes, idx_bytes
    left_out: dict[str, int] = field(default_factory=dict)  # or changed, and how often


def has_shards(folder: Path) -> bool:
    """Whether a build got as far as its first shard."""
    return _record(folder, 0).is_file()


def read_shards(folder: Path, sources: Sequence[Source]) -> list[Shard]:
    """The finished shards that a build can go on from; those behind a damaged one are left out.

    Raises:
        UserError: what a shard was made from changed since.
    """
    shards: list[Shard] = []
    for number in itertools.count():
        try:
            shard = Shard(**json.loads(_record(folder, number).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return shards
        if not _intact(folder, shard):
            return shards
        _refuse_change(shard, sources)
        shards.append(shard)
    raise AssertionError("unreachable")


def write_shards(
    folder: Path, sources: Sequence[Source], done: Sequence[Shard], encoder: Encoder, shard_bytes: int
) -> list[Shard]:
    """Tokenize what ``done`` does not cover; return all shards.

    A shard is of one source and about ``shard_bytes`` of text. Where shards are cut has no influence on the dataset.
    """
    shards = list(done)
    sizes = [source.text_bytes() for source in sources]
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) else None
    with progress(total, "tokenizing", initial=sum(shard.text_bytes for shard in done)) as bar:
        writer = _ShardWriter(folder, encoder, shard_bytes, bar)
        for order, source in enumerate(sources):
            own = [shard for shard in done if shard.source == order]
            if own and own[-1].complete:
                continue
            place = own[-1].last if own else None
            # What was found when the source was opened is already told in its first shard.
            before = source.passed_over if own else Counter[str]()
            complete = False
            with closing(_encoded(source, place, encoder, min(_BATCH_CHARACTERS, shard_bytes))) as batches:
                while not complete:
                    shard, before = writer.write(len(shards), order, source, place, batches, before)
                    shards.append(shard)
                    place, complete = shard.last, shard.complete
    return shards


def join_shards(folder: Path, shards: Sequence[Shard], dtype: type[np.number]) -> dict[str, dict[str, Any]]:
    """Write the .bin and .idx of every split out of the shards; return what the manifest says of them.

    Byte for byte what one ``IndexedDatasetBuilder`` would write, which however holds the lengths of all documents.
    """
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        files = [_prefix(folder, shard.number, split) for shard in shards if shard.splits[split]["documents"]]
        digests = {"bin_sha256": _join_tokens(folder / f"{split}.bin", files)}
        _join_index(folder / f"{split}.idx", files, dtype)
        digests["idx_sha256"] = file_sha256(folder / f"{split}.idx")
        counts = {key: sum(shard.splits[split][key] for shard in shards) for key in ("documents", "tokens")}
        sizes = {f"{suffix}_bytes": (folder / f"{split}.{suffix}").stat().st_size for suffix in ("bin", "idx")}
        splits[split] = {**counts, **sizes, **digests}
    return splits


class _ShardWriter:
    """Tokenizes batches of documents into shards of about ``shard_bytes`` of text, and shows how fast."""

    def __init__(self, folder: Path, encoder: Encoder, shard_bytes: int, bar: Any) -> None:
        self._folder = folder
        self._encoder = encoder
        self._shard_bytes = shard_bytes
        self._bar = bar
        self._start = time.monotonic()
        self._documents = self._tokens = 0

    def write(
        self,
        number: int,
        order: int,
        source: Source,
        first: Position | None,
        batches: Iterator[_Batch],
        before: Counter[str],
    ) -> tuple[Shard, Counter[str]]:
        """Write shard ``number`` out of source number ``order``; with its record, which comes last, it counts.

        Args:
            before: what the source had left out before ``first``.

        Returns:
            the shard, and what the source has left out up to its end.
        """
        prefixes = {split: _prefix(self._folder, number, split) for split in SPLITS}
        builders = {
            split: IndexedDatasetBuilder(f"{prefix}.bin", dtype=self._encoder.dtype)
            for split, prefix in prefixes.items()
        }
        splits = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
        text_bytes, last, complete, left_out = 0, first, True, before
        lost = Counter[str]()
        for batch in batches:
            for document in batch.documents:
                builders[document.split].add_document(torch.from_numpy(document.ids), [document.ids.size])
                splits[document.split]["documents"] += 1
                splits[document.split]["tokens"] += document.ids.size
                self._tokens += document.ids.size
                lost += document.lost
            size = sum(document.text_bytes for document in batch.documents)
            self._show(len(batch.documents), size)
            text_bytes, last, left_out = text_bytes + size, batch.last, batch.left_out
            if text_bytes >= self._shard_bytes:
                complete = False
                break
        for split, prefix in prefixes.items():
            builders[split].finalize(f"{prefix}.idx")
            splits[split] |= {f"{suffix}_bytes": sync(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")}
        state = source.state(first, last)
        found = dict(left_out - before + lost)
        shard = Shard(number, order, source.name, first, last, complete, state, text_bytes, splits, found)
        write_atomically(_record(self._folder, number), json.dumps(asdict(shard)), durable=True)
        return shard, left_out

    def _show(self, documents: int, text_bytes: int) -> None:
        self._documents += documents
        rate = self._tokens / max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{self._documents} documents, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(text_bytes)


def _encoded(source: Source, place: Position | None, encoder: Encoder, characters: int) -> Generator[_Batch]:
    """The documents of a source from ``place`` on, tokenized in lists of about so many characters, in their order.

    Every core encodes lists of its own, some ahead of the writer: cores that share one list wait for whoever has the
    longest document. The last list, which may be empty, tells what the source has left out behind its last document.
    """
    cores = len(os.sched_getaffinity(0))
    waiting = deque[_Waiting]()
    with ThreadPoolExecutor(cores) as pool, closing(source.read(place)) as documents:
        try:
            for texts, last, left_out in _batches(documents, source, place, characters):
                waiting.append((pool.submit(encoder.encode, texts), last, left_out))
                if len(waiting) > 2 * cores:
                    yield _finished(waiting)
        except UserError:  # what came before it is kept
            while waiting:
                yield _finished(waiting)
            raise
        while waiting:
            yield _finished(waiting)


def _finished(waiting: deque[_Waiting]) -> _Batch:
    """The next list, as soon as it is encoded."""
    documents, last, left_out = waiting.popleft()
    return _Batch(documents.result(), last, left_out)


def _batches(
    documents: Iterator[tuple[str, Position]], source: Source, place: Position | None, characters: int
) -> Iterator[tuple[list[str], Position | None, Counter[str]]]:
    """Documents in lists of about so many characters, the place behind each, and what is left out up to there."""
    batch: list[str] = []
    held = 0
    for text, place in documents:
        batch.append(text)
        held += len(text)
        if held >= characters:
            yield batch, place, Counter(source.left_out)
            batch, held = [], 0
    yield batch, place, Counter(source.left_out)


def _refuse_change(shard: Shard, sources: Sequence[Source]) -> None:
    if shard.source >= len(sources) or sources[shard.source].name != shard.name:
        return  # data.sources itself differs, which the comparison of the settings tells better
    try:
        unchanged = sources[shard.source].state(shard.first, shard.last) == shard.state
    except UserError:  # it is gone
        unchanged = False
    if not unchanged:
        raise UserError(
            f"data.sources: what shard {shard.number} of the interrupted build was made from, a part of {shard.name}, "
            "changed since; restore it, or start anew: mosa data build CONFIG --force"
        )


def _intact(folder: Path, shard: Shard) -> bool:
    for split, counts in shard.splits.items():
        for suffix in ("bin", "idx"):
            file = Path(f"{_prefix(folder, shard.number, split)}.{suffix}")
            if not file.is_file() or file.stat().st_size != counts[f"{suffix}_bytes"]:
                return False
    return True


def _join_tokens(target: Path, prefixes: Iterable[str]) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as joined:
        for prefix in prefixes:
            with open(f"{prefix}.bin", "rb") as part:
                while chunk := part.read(_COPY):
                    digest.update(chunk)
                    joined.write(chunk)
    sync(target)
    return digest.hexdigest()


def _join_index(target: Path, prefixes: Sequence[str], dtype: type[np.number]) -> None:
    """An .idx has a head, two counts, and three arrays: length and offset of every sequence, first one of a document.

    A document is one sequence here.
    """

    def lengths() -> Iterator[np.ndarray]:
        for prefix in prefixes:
            stored = IndexedDataset(prefix)
            yield stored.sequence_lengths.copy()  # int32 [documents of the shard]; a view would outlive its file

    count = sum(map(len, lengths()))
    with target.open("wb") as joined:
        with open(f"{prefixes[0]}.idx", "rb") as first:
            joined.write(first.read(_INDEX_HEAD))
        joined.write(struct.pack("<QQ", count, count + 1))
        for part in lengths():
            joined.write(part.tobytes())
        offset = 0
        for part in lengths():
            ends = offset + np.cumsum(part, dtype=np.int64) * DType.size(dtype)
            joined.write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes())
            offset = int(ends[-1])
        numbers = 0
        for part in lengths():
            joined.write(np.arange(numbers, numbers + len(part), dtype=np.int64).tobytes())
            numbers += len(part)
        joined.write(np.array([count], dtype=np.int64).tobytes())
    sync(target)


def _record(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06}.json"


def _prefix(folder: Path, number: int, split: str) -> str:
    return str(folder / f"shard-{number:06}.{split}")
