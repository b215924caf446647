"""What a build leaves out or changes: nothing is lost without a word."""

from __future__ import annotations

from collections import Counter

EMPTY = "documents without text"
NOT_UTF8 = "files that are not UTF-8 text"
BROKEN_LINKS = "links to nothing"
HIDDEN = "files and folders whose name begins with a dot"
SEEN_AGAIN = "links to folders that are read already"
MENDED = "documents with half of a surrogate pair, which became U+FFFD"


def mended(text: str, left_out: Counter[str]) -> str:
    """The text as UTF-8 can hold it: JSON may spell half of a surrogate pair, which is not a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        left_out[MENDED] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
