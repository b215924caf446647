"""Encode documents to token ids, assign them to splits, and count the text that the tokenizer loses."""

from __future__ import annotations

import hashlib
import string
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megatron_mosa.data.left_out import EARLY_ENDS, LOST, UNKNOWN
from megatron_mosa.data.tokenizer import PROBE, knows_every_character, unknown_id

_PLAIN = "".join(filter(str.isascii, PROBE)) + string.printable
_IS_WHITE_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])  # False for all higher code points, too


class Encoded(NamedTuple):
    """An encoded document."""

    split: str
    ids: np.ndarray  # [T + 1], the end-of-document token last
    text_bytes: int
    lost: Counter[str]


@dataclass(frozen=True)
class Encoder:
    """Encodes documents as plain text, each followed by the end-of-document token. Thread-safe."""

    tokenizer: Tokenizer
    end_of_document_id: int
    dtype: type[np.number]
    validation_fraction: float

    @cached_property
    def _loses_text(self) -> bool:
        if not knows_every_character(self.tokenizer):
            return True
        # What removes characters that it knows, removes some of these; normalizers that join accents leave all.
        return bool(self._count_lost(_PLAIN, self.tokenizer.encode(_PLAIN, add_special_tokens=False)))

    @cached_property
    def _unknown_id(self) -> int | None:
        unknown = unknown_id(self.tokenizer)
        return None if unknown == self.end_of_document_id else unknown  # that one is left out like any early end

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Encode documents, in the calling thread only if TOKENIZERS_PARALLELISM is false."""
        # Only offsets tell what was lost; computing them takes a third more time.
        encode = self.tokenizer.encode_batch if self._loses_text else self.tokenizer.encode_batch_fast
        documents = []
        for text, encoding in zip(texts, encode(texts, add_special_tokens=False), strict=True):
            content = text.encode()
            split = "validation" if in_validation(content, self.validation_fraction) else "train"
            lost = self._count_lost(text, encoding) if self._loses_text else Counter[str]()
            found = np.array(encoding.ids, dtype=self.dtype)
            # Models that have the token as an ordinary word, as Unigram models do, find its name in a text.
            kept = found[found != self.end_of_document_id]
            if kept.size < found.size:
                lost[EARLY_ENDS] = found.size - kept.size
            documents.append(Encoded(split, np.append(kept, self.dtype(self.end_of_document_id)), len(content), lost))
        return documents

    def _count_lost(self, text: str, encoding: Any) -> Counter[str]:
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64).reshape(-1, 2)
        starts, ends = (np.bincount(column, minlength=len(text) + 1) for column in offsets.T)
        is_uncovered = (starts - ends).cumsum()[:-1] == 0  # as many tokens have ended as started
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)[is_uncovered]
        is_white_space = _IS_WHITE_SPACE[np.minimum(codes, len(_IS_WHITE_SPACE) - 1)]
        lost = Counter({LOST: int(codes.size - is_white_space.sum())})
        if self._unknown_id is not None:
            lost[UNKNOWN] = encoding.ids.count(self._unknown_id)
        return +lost


def in_validation(content: bytes, validation_fraction: float) -> bool:
    """Return whether a document is held out. It depends only on the text, so equal texts are in the same split."""
    head = hashlib.sha256(content).digest()[:8]
    return int.from_bytes(head, "big") / 2**64 < validation_fraction
