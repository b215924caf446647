"""Shards, the finished parts of a build: write them one by one, check them when a build resumes, and join them."""

from __future__ import annotations

import hashlib
import itertools
import json
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

from megatron_mosa.data.encoder import Encoded, Encoder
from megatron_mosa.data.hashing import file_sha256
from megatron_mosa.data.manifest import SPLITS
from megatron_mosa.data.sources import Position, Source, total_text_bytes
from megatron_mosa.errors import UserError
from megatron_mosa.utils import counted, load_json, progress, sync, usable_processors, write_atomically

_BATCH_CHARACTERS = 1 << 18  # encoded by a thread at once; encodings take about 100 bytes per token
_COPY = 1 << 24  # bytes
_INDEX_HEADER = 18  # bytes of an .idx before the counts: magic, version, data type; the same in all files of a type


class _Batch(NamedTuple):
    """Consecutive documents of a source."""

    documents: list[Encoded]
    last: Position | None  # behind them
    left_out: Counter[str]  # of the source from its beginning to there


_Pending = tuple[Future[list[Encoded]], Position | None, Counter[str]]  # a batch that is being encoded


@dataclass(frozen=True)
class Shard:
    """The record of a finished shard: the tokens of the documents between two positions of one source."""

    number: int
    source: int  # index in data.sources
    name: str  # of the source
    first: Position | None
    last: Position | None
    complete: bool  # the source ends here
    state: str  # ``Source.state`` of the positions, to detect changes
    text_bytes: int
    splits: dict[str, dict[str, int]]  # documents, tokens, bin_bytes, idx_bytes
    left_out: dict[str, int] = field(default_factory=dict)  # counts of what was left out or changed


def has_shards(folder: Path) -> bool:
    """Return whether a build has finished its first shard."""
    return _record_path(folder, 0).is_file()


def read_shards(folder: Path, sources: Sequence[Source]) -> list[Shard]:
    """Return the shards from which a build can continue: all before the first missing or damaged one.

    Raises:
        UserError: the source of a shard has changed.
    """
    shards: list[Shard] = []
    for number in itertools.count():
        try:
            shard = Shard(**load_json(_record_path(folder, number)))
        except (OSError, ValueError, TypeError):
            return shards
        if not _is_intact(folder, shard):
            return shards
        _check_unchanged(shard, sources)
        shards.append(shard)
    raise AssertionError("unreachable")


def write_shards(
    folder: Path, sources: Sequence[Source], done: Sequence[Shard], encoder: Encoder, shard_bytes: int
) -> list[Shard]:
    """Tokenize everything that the shards in ``done`` do not cover; return all shards.

    A shard contains about ``shard_bytes`` of text of one source. The boundaries do not affect the dataset.
    """
    shards = list(done)
    initial = sum(shard.text_bytes for shard in done)
    with progress(total_text_bytes(sources), "tokenizing", initial=initial) as bar:
        writer = _ShardWriter(folder, encoder, shard_bytes, bar)
        for index, source in enumerate(sources):
            own = [shard for shard in done if shard.source == index]
            if own and own[-1].complete:
                continue
            position = own[-1].last if own else None
            # A source's first shard counts what was left out when the source was opened.
            counted = source.left_out_at_open if own else Counter[str]()
            complete = False
            with closing(_encode(source, position, encoder, min(_BATCH_CHARACTERS, shard_bytes))) as batches:
                while not complete:
                    shard, counted = writer.write(len(shards), index, source, position, batches, counted)
                    shards.append(shard)
                    position, complete = shard.last, shard.complete
    return shards


def join_shards(folder: Path, shards: Sequence[Shard], dtype: type[np.number]) -> dict[str, dict[str, Any]]:
    """Join the shards into the .bin and .idx of every split; return their description for the manifest.

    The files equal those of a single ``IndexedDatasetBuilder``, which would keep all documents' lengths in memory.
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
    """Writes batches of documents to shards of about ``shard_bytes`` of text, and updates a progress bar."""

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
        index: int,
        source: Source,
        first: Position | None,
        batches: Iterator[_Batch],
        counted: Counter[str],
    ) -> tuple[Shard, Counter[str]]:
        """Write shard ``number``, from source number ``index``. Its record is written last and makes it valid.

        Args:
            number: number of the shard in the dataset.
            index: index of the source in data.sources.
            source: the source.
            first: position where the shard begins.
            batches: the documents from there on.
            counted: what earlier shards have counted as left out of this source.

        Returns:
            the shard, and ``counted`` including it.
        """
        import torch  # slow to import, like Megatron-core: a build with nothing to do needs neither
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        prefixes = {split: _prefix(self._folder, number, split) for split in SPLITS}
        builders = {
            split: IndexedDatasetBuilder(f"{prefix}.bin", dtype=self._encoder.dtype)
            for split, prefix in prefixes.items()
        }
        splits = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
        text_bytes, last, complete, left_out = 0, first, True, counted
        lost = Counter[str]()
        for batch in batches:
            for document in batch.documents:
                builders[document.split].add_document(torch.from_numpy(document.ids), [document.ids.size])
                splits[document.split]["documents"] += 1
                splits[document.split]["tokens"] += document.ids.size
                self._tokens += document.ids.size
                lost += document.lost
            size = sum(document.text_bytes for document in batch.documents)
            self._update_bar(len(batch.documents), size)
            text_bytes, last, left_out = text_bytes + size, batch.last, batch.left_out
            if text_bytes >= self._shard_bytes:
                complete = False
                break
        for split, prefix in prefixes.items():
            builders[split].finalize(f"{prefix}.idx")
            splits[split] |= {f"{suffix}_bytes": sync(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")}
        state = source.state(first, last)
        counts = dict(left_out - counted + lost)
        shard = Shard(number, index, source.name, first, last, complete, state, text_bytes, splits, counts)
        write_atomically(_record_path(self._folder, number), json.dumps(asdict(shard)), durable=True)
        return shard, left_out

    def _update_bar(self, documents: int, text_bytes: int) -> None:
        self._documents += documents
        rate = self._tokens / max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(f"{counted(self._documents, 'document')}, {rate:,.0f} tokens/s", refresh=False)
        self._bar.update(text_bytes)


def _encode(source: Source, position: Position | None, encoder: Encoder, characters: int) -> Generator[_Batch]:
    """Yield the encoded documents of a source after ``position``, in order and in batches of about ``characters``.

    Every core encodes whole batches, some ahead of the writer: cores that share a batch would wait for the longest
    document in it. The last batch, which may be empty, counts what was left out behind the last document.
    """
    cores = usable_processors()
    pending = deque[_Pending]()

    def next_batch() -> _Batch:
        documents, last, left_out = pending.popleft()
        return _Batch(documents.result(), last, left_out)

    with ThreadPoolExecutor(cores) as pool, closing(source.read(position)) as documents:
        try:
            for texts, last, left_out in _batches(documents, source, position, characters):
                pending.append((pool.submit(encoder.encode, texts), last, left_out))
                if len(pending) > 2 * cores:
                    yield next_batch()
        except UserError:  # keep the documents before it
            while pending:
                yield next_batch()
            raise
        while pending:
            yield next_batch()


def _batches(
    documents: Iterator[tuple[str, Position]], source: Source, position: Position | None, characters: int
) -> Iterator[tuple[list[str], Position | None, Counter[str]]]:
    """Yield batches of documents, each with the position behind it and what the source has left out up to there."""
    batch: list[str] = []
    size = 0
    for text, position in documents:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch, position, Counter(source.left_out)
            batch, size = [], 0
    yield batch, position, Counter(source.left_out)


def _check_unchanged(shard: Shard, sources: Sequence[Source]) -> None:
    if shard.source >= len(sources) or sources[shard.source].name != shard.name:
        return  # data.sources itself has changed, which the comparison of the settings reports better
    try:
        is_unchanged = sources[shard.source].state(shard.first, shard.last) == shard.state
    except UserError:  # it is gone
        is_unchanged = False
    if not is_unchanged:
        raise UserError(
            f"data.sources: the part of {shard.name} in shard {shard.number} of the interrupted build has changed "
            "since; restore it, or start over: mosa data build CONFIG --force"
        )


def _is_intact(folder: Path, shard: Shard) -> bool:
    sizes = {
        Path(f"{_prefix(folder, shard.number, split)}.{suffix}"): counts[f"{suffix}_bytes"]
        for split, counts in shard.splits.items()
        for suffix in ("bin", "idx")
    }
    return all(file.is_file() and file.stat().st_size == size for file, size in sizes.items())


def _join_tokens(target: Path, prefixes: Iterable[str]) -> str:
    """Concatenate the .bin files; return the SHA-256 of the result."""
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
    """Join .idx files: a header, two counts, and three arrays: sequence lengths, their offsets, document starts.

    Here every document is one sequence.
    """

    from megatron.core.datasets.indexed_dataset import IndexedDataset

    def lengths() -> Iterator[np.ndarray]:
        for prefix in prefixes:
            stored = IndexedDataset(prefix)
            yield stored.sequence_lengths.copy()  # int32 [documents of the shard]; a view would outlive its file

    count = sum(map(len, lengths()))
    with target.open("wb") as joined:
        with open(f"{prefixes[0]}.idx", "rb") as first:
            joined.write(first.read(_INDEX_HEADER))
        joined.write(struct.pack("<QQ", count, count + 1))
        for part in lengths():
            joined.write(part.tobytes())
        offset = 0
        for part in lengths():
            ends = offset + np.cumsum(part, dtype=np.int64) * np.dtype(dtype).itemsize
            joined.write(np.concatenate(([offset], ends[:-1])).astype(np.int64).tobytes())
            offset = int(ends[-1])
        for start in range(0, count + 1, _COPY // 8):
            joined.write(np.arange(start, min(start + _COPY // 8, count + 1), dtype=np.int64).tobytes())
    sync(target)


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06}.json"


def _prefix(folder: Path, number: int, split: str) -> str:
    return str(folder / f"shard-{number:06}.{split}")
