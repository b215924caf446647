"""Tokenizers: a byte-level BPE trained on the corpus, or one that exists already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_mosa.errors import UserError, nearest
from megatron_mosa.utils import first_line

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"

_END_TOKENS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|end▁of▁sentence|>", "[EOS]", "[SEP]")
# Of scripts and planes that no vocabulary of characters holds all of, the last of each size in UTF-8 among them.
_RARE_CHARACTERS = "\x01ÿĀ߿ࠀഖⵣ꧁힣\ue000\uffff\U00010000𓀀🫨\U000e0001\U0010ffff"
PROBE = (
    "The quick brown fox jumps over the lazy dog. It's 12:30, isn't it? They've paid $1,234.56 (some 1\u202f1 €)!\n\n"
    "  def f(x):\n\treturn [x**2 for _ in range(10)]  # TODO\r\n"
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; où est l'hôtel? Съешь ещё этих мягких булок. "
    "天地玄黃,宇宙洪荒。いろはにほへと 키스의 고유조건은 نص حكيم له سر قاطع ऋषियों को सताने वाले 🫨👩‍👩‍👧 e\u0301 ﬁ x²"
)
"""Text in which tokenizers differ: contractions, numbers, white space, accents, scripts, emoji, combining marks."""
_SMALLEST_VOCABULARY = 257  # all bytes and the end-of-document token


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` tokens, the end-of-document token ``<|endoftext|>`` included.

    Every text can be encoded, and decodes to itself. The same documents give the same tokenizer. Memory grows
    with the number of distinct words, not with the length of the corpus.

    Raises:
        UserError: ``vocab_size`` has no room for the 256 bytes and the end-of-document token.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            f"data.vocab_size={vocab_size} is too small for a byte-level BPE; expected {_SMALLEST_VOCABULARY} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _plain(tokenizer)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Load a tokenizer.json, a folder that holds one, or a tokenizer of the Hugging Face hub by name.

    Raises:
        UserError: no such file, not a tokenizer, or the hub could not be reached or does not have it.
    """
    path = tokenizer_path(name_or_path)
    try:
        if path is not None:
            return _plain(Tokenizer.from_file(str(path)))
        return _plain(Tokenizer.from_pretrained(name_or_path))
    # The library raises bare Exception, and for the hub whatever its HTTP client raises.
    except Exception as error:
        reason = first_line(error)
        if path is not None:
            raise UserError(f"data.tokenizer: {path} is not a tokenizer.json that can be read: {reason}") from error
        raise UserError(
            f"data.tokenizer='{name_or_path}' is no file or folder, and the Hugging Face hub did not give a tokenizer "
            f"of that name: {reason}; give the path of a tokenizer.json, or null to train one"
        ) from error


def tokenizer_path(name_or_path: str) -> Path | None:
    """The tokenizer.json that a path stands for, or None for a name of the Hugging Face hub.

    Raises:
        UserError: a path without a tokenizer.json.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / TOKENIZER_FILE).is_file():
            return path / TOKENIZER_FILE
        raise UserError(
            f"data.tokenizer: folder {path} holds no {TOKENIZER_FILE}; save one there with the tokenizers library "
            "(tokenizer.save, or save_pretrained of a fast transformers tokenizer)"
        )
    # A name of the hub is "name" or "owner/name".
    if name_or_path.startswith(("/", ".", "~")) or name_or_path.endswith(".json") or name_or_path.count("/") > 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"data.tokenizer: no file or folder {path}{nearest(path.name, siblings)}")
    return None


def end_of_document_id(tokenizer: Tokenizer, path: Path | None = None) -> int:
    """The id of the token that ends a document.

    It is the eos_token of the tokenizer_config.json beside ``path``, the tokenizer's file, where there is one;
    else the first usual name that the vocabulary holds.

    Raises:
        UserError: the vocabulary has none of them.
    """
    configured = _configured_end_token(path)
    names = ([configured] if configured else []) + list(_END_TOKENS)
    for name in names:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return token_id
    raise UserError(
        f"data.tokenizer: no end-of-document token among {', '.join(names)}; add one of them to the tokenizer as a "
        "special token, or name its own as eos_token in a tokenizer_config.json beside it"
    )


def adds_special_tokens(path: Path) -> bool:
    """Whether the tokenizer in a file has a template that adds tokens to a text."""
    tokenizer = Tokenizer.from_file(str(path))
    return tokenizer.encode(PROBE).ids != tokenizer.encode(PROBE, add_special_tokens=False).ids


def knows_every_character(tokenizer: Tokenizer) -> bool:
    """Whether any text can be encoded without loss, as with tokenizers on bytes: tried on characters that are rare."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    for character in _RARE_CHARACTERS:
        tokens = tokenizer.encode(character, add_special_tokens=False).tokens
        if not tokens or unknown in tokens:
            return False
    return True


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the highest token id, added tokens included (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


class TokenizerIdentity(NamedTuple):
    """What tells two tokenizers apart: the bytes of their files or, where those differ, the ids that they give.

    A tokenizer.json that was saved again by another program often has other bytes and gives the same ids.
    """

    file_hash: str | None
    """SHA-256 of the tokenizer.json; None: not known."""

    encoding_hash: str | None
    """What ``encoding_hash`` gives; None: not known."""

    @classmethod
    def recorded(cls, data: Mapping[str, Any]) -> TokenizerIdentity:
        """What a checkpoint's metadata says of its data."""
        return cls(data.get("tokenizer_hash"), data.get("encoding_hash"))

    def is_same(self, other: TokenizerIdentity) -> bool:
        """Whether both give the same ids, as far as the hashes tell."""
        if self.encoding_hash is not None and self.encoding_hash == other.encoding_hash:
            return True
        return self.file_hash == other.file_hash


def tokenizer_identity(path: str | Path) -> TokenizerIdentity:
    """Of a tokenizer.json."""
    return TokenizerIdentity(tokenizer_hash(path), encoding_hash(load_tokenizer(str(path))))


def encoding_hash(tokenizer: Tokenizer) -> str:
    """A SHA-256 of what the tokenizer does: its vocabulary, and the ids of a text and of every token's own text.

    What a training run never meets is left out: special tokens that a template adds, truncation and padding.
    """
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items())
    texts = [PROBE, *(token for token, _ in vocabulary)]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    content = json.dumps([vocabulary, [encoding.ids for encoding in encodings]])
    return hashlib.sha256(content.encode()).hexdigest()


def tokenizer_hash(path: str | Path) -> str:
    """The SHA-256 of a tokenizer.json, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Encode whole documents as they are: nothing cut, padded or added, no special token out of mere text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]  # templates add special tokens
    tokenizer.encode_special_tokens = True
    return tokenizer


def _configured_end_token(path: Path | None) -> str | None:
    config = path.with_name("tokenizer_config.json") if path else None
    if config is None or not config.is_file():
        return None
    try:
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"data.tokenizer: cannot read {config}: {error}") from error
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
