"""Read Hugging Face datasets, streamed or downloaded."""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_mosa.config import expanded
from megatron_mosa.data.json_rows import parse_line
from megatron_mosa.data.left_out import EMPTY, replace_surrogates
from megatron_mosa.data.reach import asking_hub
from megatron_mosa.data.tables import TextColumn
from megatron_mosa.errors import UserError, nearest
from megatron_mosa.utils import counted, first_line

HUB = "hf:"

_SYNTAX = "hf:NAME, hf:NAME:CONFIGURATION, hf:NAME@SPLIT or hf:NAME:CONFIGURATION@SPLIT"
_ATTEMPTS = 3  # without a document in between; `datasets` retries single requests before it gives up
_PAUSE = 5.0  # seconds between attempts
_READ_AHEAD = 64  # documents
_END = object()
_BOM = "\ufeff"

Item = TypeVar("Item")


class SourceInterruptedError(UserError):
    """A source stopped before its end; an interrupted build can continue from what it wrote so far."""


def refuse_saved_dataset(source: str, folder: Path) -> None:
    """Refuse what `datasets` wrote with ``save_to_disk``: its own Arrow files, which cannot be loaded by name.

    Raises:
        UserError: the folder is one.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        raise UserError(
            f"data.sources: '{source}' was written by save_to_disk of `datasets`; write it as Parquet instead: "
            "datasets.load_from_disk(FOLDER).to_parquet(FILE), for each split, and name the files"
        )


class HubSource:
    """A Hugging Face dataset ``hf:NAME``, optionally with ``:CONFIGURATION`` and ``@SPLIT`` (default train).

    Args:
        source: as written in ``data.sources``.
        text_field: the column that holds the text.
        streaming: read over the network during the build; False: first download everything into the library's cache.
        timeout: seconds without a document after which a stream counts as stalled.

    Raises:
        UserError: ``source`` does not have this form.
    """

    def __init__(self, source: str, text_field: str, *, streaming: bool, timeout: float) -> None:
        self.name = source
        self.text_field = text_field
        self.left_out_at_open, self.left_out = Counter[str](), Counter[str]()
        body, _, split = source.removeprefix(HUB).partition("@")
        self._dataset, _, configuration = body.partition(":")
        self._configuration = configuration or None
        self._split = split or "train"
        self._streaming = streaming
        self._timeout = timeout if streaming else None
        refuse_saved_dataset(source, expanded("data.sources", body))
        if not self._dataset:
            raise UserError(f"data.sources: '{source}' does not name a dataset; expected {_SYNTAX}")
        if streaming and "[" in self._split:
            raise UserError(f"data.sources: '{source}': a part of a split cannot be streamed; set data.streaming=false")
        import datasets  # slow to import and needed only here; not later, when the time of a stream is limited

        self._library = datasets

    def describe(self) -> dict[str, Any]:
        """Return the number of files, and a hash of their names and revisions (modification times if local).

        Raises:
            UserError: the dataset, configuration or split does not exist, or the hub cannot be reached.
        """
        return self._description

    @cached_property
    def _builder(self) -> Any:
        return self._library.load_dataset_builder(self._dataset, self._configuration)

    @cached_property
    def _description(self) -> dict[str, Any]:
        is_local = self._dataset.startswith(("/", ".", "~")) or Path(self._dataset).exists()
        try:
            with nullcontext() if is_local else asking_hub(f"the dataset '{self._dataset}'"):
                builder = self._builder
        except UserError as error:
            raise UserError(f"data.sources: {error}") from error
        except Exception as error:  # the library, its HTTP client and its file systems each raise their own
            raise UserError(
                f"data.sources: could not open {self.name}: {first_line(error)}; check the name ({_SYNTAX}) and the "
                "network, or download the dataset and give the path of its files"
            ) from error
        splits: dict[str, Any] = builder.config.data_files or {}
        split = self._split.partition("[")[0]
        if split not in splits:
            raise UserError(
                f"data.sources: {self.name} has no split '{split}'{nearest(split, map(str, splits))}; "
                f"expected {', '.join(map(str, splits))}"
            )
        files = splits[split]
        listing = json.dumps([sorted(map(str, files)), getattr(files, "origin_metadata", None)])
        counts = {"files": len(files), "bytes": None}
        return {"source": self.name, "kind": "hub", **counts, "listing": hashlib.sha256(listing.encode()).hexdigest()}

    def text_bytes(self) -> int | None:
        """Return None: the size is unknown until everything has been read."""
        return None

    def read(self, start: dict[str, Any] | None = None) -> Generator[tuple[str, dict[str, Any]]]:
        """See ``Source``. A stream that fails or stalls is reopened where it stopped, a few times.

        Raises:
            SourceInterruptedError: every attempt failed, stalled or ended too early.
            UserError: there is no text column of that name.
        """
        self.left_out = Counter[str]()
        position = start or {"row": 0}
        column = TextColumn(self.text_field, self.name, is_found=start is not None)  # documents end at rows with text
        failures = 0
        while True:
            try:
                with closing(_with_timeout(partial(self._rows, position, column), self._timeout)) as rows:
                    for text, position in rows:
                        failures = 0
                        if text:
                            yield replace_surrogates(text, self.left_out), position
                        else:
                            self.left_out[EMPTY] += 1
                return
            except UserError:
                raise
            except Exception as error:  # see _description
                failures += 1
                if failures >= _ATTEMPTS or not self._streaming:
                    raise SourceInterruptedError(
                        f"data.sources: {self.name} stopped after {counted(position['row'], 'document')}: "
                        f"{first_line(error)}; run the same command again to continue from there"
                    ) from error
                logging.getLogger(__name__).warning(f"{self.name}: {first_line(error)}; reopening the stream")
                time.sleep(_PAUSE)

    def state(self, first: dict[str, Any] | None, last: dict[str, Any] | None) -> str:
        """Return the revision of the whole dataset."""
        return self._description["listing"]

    def _rows(self, position: dict[str, Any], column: TextColumn) -> Iterator[tuple[str | None, dict[str, Any]]]:
        """Yield rows after ``position``. Its "state" lets a stream resume without reading up to it."""
        dataset, is_json_lines = self._open()
        rows: Any
        read = position["row"]
        if not self._streaming:
            rows = dataset.select(range(read, len(dataset))) if read < len(dataset) else ()
        elif "state" in position:
            dataset.load_state_dict(position["state"])
            rows = dataset
        else:
            rows = dataset.skip(read) if read else dataset
        for content in rows:
            read += 1
            location = f"row {read} of {self.name}"
            try:
                row = _json_object(content["text"]) if is_json_lines else content
            except ValueError as error:
                raise UserError(f"data.sources: {location} {error}; repair the dataset or remove it") from None
            state = {"state": rows.state_dict()} if self._streaming else {}
            yield column.text(row, location), {"row": read, **state}
        column.check_found()
        split = (self._builder.info.splits or {}).get(self._split)
        if split is not None and read < (split.num_examples or 0):
            raise EOFError(f"it ended, but its description says {split.num_examples}")

    def _open(self) -> tuple[Any, bool]:
        """Return the rows of the split, and whether they are unparsed lines of JSON.

        The library's own JSON reader infers the type of every column from the first megabytes, and rejects files
        whose later rows differ in a field that does not matter here.
        """
        if self._builder.name == "json":
            split, bracket, part = self._split.partition("[")
            files = {"train": list(map(str, self._builder.config.data_files[split]))}
            lines: Any = self._library.load_dataset(
                "text", data_files=files, split=f"train{bracket}{part}", streaming=self._streaming
            )
            first = next(iter(lines), None)
            with suppress(ValueError):  # not one object per line
                if first is None or (first["text"].lstrip(_BOM)[:1] == "{" and _json_object(first["text"]) is not None):
                    return lines, True
        dataset: Any = self._library.load_dataset(
            self._dataset, self._configuration, split=self._split, streaming=self._streaming
        )
        return dataset, False


def _json_object(line: str) -> dict[str, Any]:
    """Return the object in a line of JSON, {} for a blank line. ValueError as in ``parse_line``, or not an object."""
    value = parse_line(line.removeprefix(_BOM).encode()) if line.strip() else {}
    if not isinstance(value, dict):
        raise ValueError(f"is {line[:40]}, not an object")
    return value


def _with_timeout(open_rows: Callable[[], Iterator[Item]], timeout: float | None) -> Generator[Item]:
    """Yield the items of an iterator that a thread reads ahead, so that waiting for one can be given up.

    Raises:
        TimeoutError: no item arrived for ``timeout`` seconds.
        Exception: whatever the iterator raises.
    """
    items: queue.Queue[Any] = queue.Queue(_READ_AHEAD)
    abandoned = threading.Event()

    def put(item: object) -> None:
        while not abandoned.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                pass

    def run() -> None:
        try:
            for item in open_rows():
                put((item, None))
                if abandoned.is_set():
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))

    threading.Thread(target=run, daemon=True).start()  # a daemon, since nothing can end a read that hangs
    try:
        while True:
            try:
                item, error = items.get(timeout=timeout)
            except queue.Empty:
                raise TimeoutError(f"no document for {timeout:g} s (data.stream_timeout)") from None
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        abandoned.set()
