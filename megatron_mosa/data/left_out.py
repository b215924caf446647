"""What a build leaves out or changes, by the names under which it is counted and reported.

Manifests record these names, so a changed name changes the fingerprint of every dataset that is built again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

EMPTY = "documents without text"
NOT_UTF8 = "files that are not UTF-8 text"
BROKEN_LINKS = "links to nothing"
HIDDEN = "files and folders whose name begins with a dot"
ALREADY_READ = "links to folders that are read already"
SURROGATES = "documents with half of a surrogate pair, which became U+FFFD"
LOST = "characters that the tokenizer does not know, and which are lost"
UNKNOWN = "unknown tokens, in place of text that the tokenizer does not know"
EARLY_ENDS = "end-of-document tokens that the tokenizer found inside documents, which are left out"

_ONE = {
    EMPTY: "document without text",
    NOT_UTF8: "file that is not UTF-8 text",
    BROKEN_LINKS: "link to nothing",
    HIDDEN: "file or folder whose name begins with a dot",
    ALREADY_READ: "link to a folder that is read already",
    SURROGATES: "document with half of a surrogate pair, which became U+FFFD",
    LOST: "character that the tokenizer does not know, and which is lost",
    UNKNOWN: "unknown token, in place of text that the tokenizer does not know",
    EARLY_ENDS: "end-of-document token that the tokenizer found inside a document, which is left out",
}


def describe_counts(left_out: Mapping[str, int]) -> list[str]:
    """Return each count with its name, which is in the singular for one."""
    # A manifest of another version may have other names.
    return [f"{count:,} {_ONE.get(what, what) if count == 1 else what}" for what, count in left_out.items()]


def replace_surrogates(text: str, left_out: Counter[str]) -> str:
    """Replace each half of a surrogate pair, which JSON can spell but UTF-8 cannot encode, by U+FFFD, and count it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        left_out[SURROGATES] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
