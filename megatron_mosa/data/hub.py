"""Hugging Face datasets as a source, streamed or downloaded."""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import cached_property, partial
from typing import Any, TypeVar

from megatron_mosa.data.json_rows import parse_line
from megatron_mosa.data.left_out import EMPTY, mended
from megatron_mosa.data.tables import TextColumn
from megatron_mosa.errors import UserError, nearest
from megatron_mosa.utils import first_line

HUB = "hf:"

_FORM = "hf:NAME, hf:NAME:CONFIGURATION, hf:NAME@SPLIT or hf:NAME:CONFIGURATION@SPLIT"
_ATTEMPTS = 3  # without a document in between; `datasets` retries single requests before it gives up
_PAUSE = 5.0  # seconds between attempts
_READ_AHEAD = 64  # documents
_END = object()

Item = TypeVar("Item")


class Interrupted(UserError):
    """A source stopped before its end; what was built from it so far is worth keeping."""


class HubSource:
    """``hf:NAME``, with ``:CONFIGURATION`` and ``@SPLIT`` (default train) where needed.

    Args:
        source: as written in ``data.sources``.
        text_field: the column with the text.
        streaming: read over the network as needed; False: download all of it into the library's cache first.
        timeout: seconds without a document after which a stream counts as stalled.

    Raises:
        UserError: not of this form.
    """

    def __init__(self, source: str, text_field: str, *, streaming: bool, timeout: float) -> None:
        self.name = source
        self.text_field = text_field
        self.passed_over, self.left_out = Counter[str](), Counter[str]()
        body, _, split = source.removeprefix(HUB).partition("@")
        self._dataset, _, configuration = body.partition(":")
        self._configuration = configuration or None
        self._split = split or "train"
        self._streaming = streaming
        self._timeout = timeout if streaming else None
        if not self._dataset:
            raise UserError(f"data.sources: '{source}' names no dataset; expected {_FORM}")
        if streaming and "[" in self._split:
            raise UserError(f"data.sources: '{source}': a part of a split cannot be streamed; set data.streaming=false")
        import datasets  # slow to import, which no other source waits for; here, and not while a stream is timed

        self._library = datasets

    def describe(self) -> dict[str, Any]:
        """The number of files, and a hash of their names and revisions (of local files: times of change).

        Raises:
            UserError: no such dataset, configuration or split, or the hub cannot be reached.
        """
        return self._description

    @cached_property
    def _builder(self) -> Any:
        return self._library.load_dataset_builder(self._dataset, self._configuration)

    @cached_property
    def _description(self) -> dict[str, Any]:
        try:
            builder = self._builder
        except Exception as error:  # of the library, its HTTP client and its file systems, each with their own
            raise UserError(
                f"data.sources: cannot open {self.name}: {first_line(error)}; check the name ({_FORM}) and network, "
                "or download the dataset and give the path of its files"
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
        """Not known before everything was read."""
        return None

    def read(self, start: dict[str, Any] | None = None) -> Generator[tuple[str, dict[str, Any]]]:
        """See ``Source``. A stream that fails or stalls is opened again where it stopped, a few times.

        Raises:
            Interrupted: it failed, stalled or ended too early every time.
            UserError: no column of text of that name.
        """
        self.left_out = Counter[str]()
        place = start or {"row": 0}
        failures = 0
        while True:
            try:
                with closing(_watched(partial(self._rows, place), self._timeout)) as rows:
                    for text, place in rows:
                        failures = 0
                        if text:
                            yield mended(text, self.left_out), place
                        else:
                            self.left_out[EMPTY] += 1
                return
            except UserError:
                raise
            except Exception as error:  # see describe
                failures += 1
                if failures >= _ATTEMPTS or not self._streaming:
                    raise Interrupted(
                        f"data.sources: {self.name} stopped after {place['row']} documents: {first_line(error)}; "
                        "run the same command again, and it goes on with what is left"
                    ) from error
                logging.getLogger(__name__).warning(f"{self.name}: {first_line(error)}; opening it again")
                time.sleep(_PAUSE)

    def state(self, first: dict[str, Any] | None, last: dict[str, Any] | None) -> str:
        """The revision of the whole dataset."""
        return self._description["listing"]

    def _rows(self, place: dict[str, Any]) -> Iterator[tuple[str | None, dict[str, Any]]]:
        """Rows from ``place`` on. Its "state" is what a stream needs to find the place without reading up to it."""
        dataset, is_json_lines = self._open()
        column = TextColumn(self.text_field, self.name)
        rows: Any
        read = place["row"]
        if not self._streaming:
            rows = dataset.select(range(read, len(dataset))) if read < len(dataset) else ()
        elif "state" in place:
            dataset.load_state_dict(place["state"])
            rows = dataset
        else:
            rows = dataset.skip(read) if read else dataset
        for content in rows:
            read += 1
            where = f"row {read} of {self.name}"
            row = self._parsed(content["text"], where) if is_json_lines else content
            state = {"state": rows.state_dict()} if self._streaming else {}
            yield column.text(row, where), {"row": read, **state}
        column.end()
        split = (self._builder.info.splits or {}).get(self._split)
        if split is not None and read < (split.num_examples or 0):
            raise EOFError(f"it ended, and its description promises {split.num_examples}")

    def _open(self) -> tuple[Any, bool]:
        """The rows of the split, and whether they are lines of JSON that are not parsed yet.

        The library's own reader of JSON infers the type of every column from the first megabytes, and refuses a file
        whose other rows differ in a field that nobody needs here.
        """
        if self._builder.name == "json":
            files = {"train": list(map(str, self._builder.config.data_files[self._split.partition("[")[0]]))}
            split = "train" + "".join(self._split.partition("[")[1:])
            lines: Any = self._library.load_dataset("text", data_files=files, split=split, streaming=self._streaming)
            first = next(iter(lines), None)
            if first is None or (first["text"].lstrip("\ufeff")[:1] == "{" and _is_json(first["text"])):
                return lines, True
        dataset: Any = self._library.load_dataset(
            self._dataset, self._configuration, split=self._split, streaming=self._streaming
        )
        return dataset, False

    def _parsed(self, line: str, where: str) -> dict[str, Any]:
        try:
            value = parse_line(line.removeprefix("\ufeff").encode()) if line.strip() else {}
        except ValueError as error:
            raise UserError(f"data.sources: {where} {error}; repair the dataset, or give others") from None
        if not isinstance(value, dict):
            raise UserError(f"data.sources: {where} is {line[:40]}, not an object; repair the dataset, or give others")
        return value


def _is_json(line: str) -> bool:
    try:
        parse_line(line.removeprefix("\ufeff").encode())
    except ValueError:
        return False
    return True


def _watched(open_rows: Callable[[], Iterator[Item]], timeout: float | None) -> Generator[Item]:
    """The items of an iterator that runs ahead in a thread of its own, so that nobody waits for it for ever.

    Raises:
        TimeoutError: no item for ``timeout`` seconds; and whatever the iterator raises.
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

    threading.Thread(target=run, daemon=True).start()  # a daemon: nothing can end a read that hangs
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
