"""What a build leaves out or changes, by the names under which it is counted and reported.

Manifests record these names, so a changed name changes the fingerprint of every dataset that is built again.
"""

from __future__ import annotations

from collections import Counter

EMPTY = "documents without text"
NOT_UTF8 = "files that are not UTF-8 text"
BROKEN_LINKS = "links to nothing"
HIDDEN = "files and folders whose name begins with a dot"
ALREADY_READ = "links to folders that are read already"
SURROGATES = "documents with half of a surrogate pair, which became U+FFFD"


def replace_surrogates(text: str, left_out: Counter[str]) -> str:
    """Replace each half of a surrogate pair, which JSON can spell but UTF-8 cannot encode, by U+FFFD, and count it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        left_out[SURROGATES] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
