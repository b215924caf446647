"""How a document becomes tokens of a split, and what of it the tokenizer loses."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from megatron_mosa.data.tokenizer import knows_every_character

LOST = "characters that the tokenizer does not know, and which are lost"
UNKNOWN = "unknown tokens, in place of text that the tokenizer does not know"

# Whether a code point is white space; there is none from the last entry on.
_IS_BLANK = np.array([chr(code).isspace() for code in range(0x3002)])


class Encoded(NamedTuple):
    """A document."""

    split: str
    ids: np.ndarray  # [T + 1], the end-of-document token last
    text_bytes: int
    lost: Counter[str]


@dataclass(frozen=True)
class Encoder:
    """Encodes documents as they are: no special tokens but one at the end of each. Safe in several threads."""

    tokenizer: Tokenizer
    end_of_document_id: int
    dtype: type[np.number]
    validation_fraction: float

    @cached_property
    def _loses_text(self) -> bool:
        return not knows_every_character(self.tokenizer)

    @cached_property
    def _unknown_id(self) -> int | None:
        token = getattr(self.tokenizer.model, "unk_token", None)
        return None if token is None else self.tokenizer.token_to_id(token)

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Tokenize documents, on this thread alone (where TOKENIZERS_PARALLELISM is false)."""
        # Offsets, which tell what was lost, cost a third more time.
        encode = self.tokenizer.encode_batch if self._loses_text else self.tokenizer.encode_batch_fast
        documents = []
        for text, encoding in zip(texts, encode(texts, add_special_tokens=False), strict=True):
            content = text.encode()
            split = "validation" if in_validation(content, self.validation_fraction) else "train"
            ids = np.array([*encoding.ids, self.end_of_document_id], dtype=self.dtype)
            lost = self._lost(text, encoding) if self._loses_text else Counter[str]()
            documents.append(Encoded(split, ids, len(content), lost))
        return documents

    def _lost(self, text: str, encoding: Any) -> Counter[str]:
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64).reshape(-1, 2)
        ends = [np.bincount(column, minlength=len(text) + 1) for column in offsets.T]
        is_in_gap = (ends[0] - ends[1]).cumsum()[:-1] == 0  # tokens that begin before a place, less those that end
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)[is_in_gap]
        is_blank = _IS_BLANK[np.minimum(codes, len(_IS_BLANK) - 1)]
        found = Counter({LOST: int(codes.size - is_blank.sum())})
        if self._unknown_id is not None:
            found[UNKNOWN] = encoding.ids.count(self._unknown_id)
        return +found


def in_validation(content: bytes, validation_fraction: float) -> bool:
    """Whether a document is held out: a function of its text alone, so that copies never straddle the splits."""
    head = hashlib.sha256(content).digest()[:8]
    return int.from_bytes(head, "big") / 2**64 < validation_fraction
