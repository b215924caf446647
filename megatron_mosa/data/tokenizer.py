"""Train, load and compare tokenizers."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_mosa.config import expanded
from megatron_mosa.data.reach import asking_hub
from megatron_mosa.errors import UserError, nearest_path
from megatron_mosa.utils import first_line, load_json

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_NAMING_THE_END = (TOKENIZER_CONFIG, "special_tokens_map.json")

_END_TOKENS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|end▁of▁sentence|>", "[EOS]", "[SEP]")
# From scripts and planes that no character vocabulary covers completely, with the last character of each UTF-8 length.
_RARE_CHARACTERS = "\x01ÿĀ߿ࠀഖⵣ꧁힣\ue000\uffff\U00010000𓀀🫨\U000e0001\U0010ffff"
PROBE = (
    "The quick brown fox jumps over the lazy dog. It's 12:30, isn't it? They've paid $1,234.56 (some 1\u202f1 €)!\n\n"
    "  def f(x):\n\treturn [x**2 for _ in range(10)]  # TODO\r\n"
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; où est l'hôtel? Съешь ещё этих мягких булок. "
    "天地玄黃,宇宙洪荒。いろはにほへと 키스의 고유조건은 نص حكيم له سر قاطع ऋषियों को सताने वाले 🫨👩‍👩‍👧 e\u0301 ﬁ x²"
)
"""Text that different tokenizers encode differently: contractions, numbers, white space, accents, scripts, emoji."""
_SMALLEST_VOCABULARY = 257  # all bytes and the end-of-document token


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` tokens, including the end-of-document token ``<|endoftext|>``.

    It encodes every text without loss. The same documents give the same tokenizer. Memory grows with the number of
    distinct words, not with the size of the corpus.

    Raises:
        UserError: ``vocab_size`` is too small for the 256 bytes and the end-of-document token.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            f"data.vocab_size must be at least {_SMALLEST_VOCABULARY} for a byte-level BPE, got {vocab_size}"
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
    return _for_plain_text(tokenizer)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Load a tokenizer.json, a folder that contains one, or a tokenizer of the Hugging Face hub.

    Raises:
        UserError: the file does not exist or is not a tokenizer, the hub cannot be reached or does not have it, or it
            fails at characters that it does not know.
    """
    return load_tokenizer_and_path(name_or_path)[0]


def load_tokenizer_and_path(name_or_path: str) -> tuple[Tokenizer, Path]:
    """``load_tokenizer``; also return its tokenizer.json, for a name on the hub in the hub's cache.

    Beside it lie the files that may name the end-of-document token, if the tokenizer has them.
    """
    tokenizer, path = _read_tokenizer(name_or_path)
    _for_plain_text(tokenizer)
    try:
        for text in (PROBE, *_RARE_CHARACTERS):
            tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"data.tokenizer='{name_or_path}' fails at characters that it does not know: {first_line(error)}; name a "
            "token of its vocabulary as unk_token (unk_id of Unigram models), pass another, or null to train one"
        ) from error
    return tokenizer, path


def tokenizer_path(name_or_path: str) -> Path | None:
    """Return the tokenizer.json that a path refers to, or None for a name on the Hugging Face hub.

    Raises:
        UserError: there is no tokenizer.json at that path.
    """
    path = expanded("data.tokenizer", name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        if (path / TOKENIZER_FILE).is_file():
            return path / TOKENIZER_FILE
        raise UserError(
            f"data.tokenizer: folder {path} has no {TOKENIZER_FILE}; save one there with the tokenizers library "
            "(tokenizer.save, or save_pretrained of a fast transformers tokenizer)"
        )
    # Names on the hub are "name" or "owner/name".
    if name_or_path.startswith(("/", ".", "~")) or name_or_path.endswith(".json") or name_or_path.count("/") > 1:
        raise UserError(
            f"data.tokenizer: {path} does not exist{nearest_path(name_or_path)}; pass a tokenizer.json, a folder "
            "with one, a Hugging Face name, or null to train one"
        )
    return None


def named_end_of_document(tokenizer: Tokenizer, path: Path | None = None) -> int:
    """Return the id of the token that ends a document.

    It is the eos_token of the tokenizer_config.json (or the older special_tokens_map.json) beside ``path``, the
    tokenizer's file, if there is one; otherwise the first of several usual names that is in the vocabulary.

    Raises:
        UserError: the vocabulary does not have that eos_token, or has none of the usual names.
    """
    for file in (path.with_name(name) for name in _NAMING_THE_END if path):
        if (configured := _end_token_in(file)) is not None:
            if (token_id := tokenizer.token_to_id(configured)) is not None:
                return token_id
            raise UserError(
                f"data.tokenizer: {file} names {configured!r} as eos_token, which the vocabulary of {TOKENIZER_FILE} "
                "does not have; name one that it has, or save the tokenizer with that token added"
            )
    found = (tokenizer.token_to_id(name) for name in _END_TOKENS)
    if (usual := next((token_id for token_id in found if token_id is not None), None)) is not None:
        return usual
    raise UserError(
        f"data.tokenizer: the vocabulary has none of the end-of-document tokens {', '.join(_END_TOKENS)}; add one of "
        f"them as a special token, or name its own as eos_token in a {TOKENIZER_CONFIG} beside it"
    )


def adds_special_tokens(path: Path) -> bool:
    """Return whether the tokenizer in a file has a template that adds tokens to a text."""
    tokenizer = Tokenizer.from_file(str(path))
    return tokenizer.encode(PROBE).ids != tokenizer.encode(PROBE, add_special_tokens=False).ids


def knows_every_character(tokenizer: Tokenizer) -> bool:
    """Return whether any text can be encoded without loss, as byte-level tokenizers do; tested on rare characters."""
    unknown = unknown_id(tokenizer)
    encoded = (tokenizer.encode(character, add_special_tokens=False).ids for character in _RARE_CHARACTERS)
    return all(ids and unknown not in ids for ids in encoded)


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the token in place of text that the model does not know; None: it has none."""
    if isinstance(tokenizer.model, models.Unigram):  # Python's class does not have its unk_id, only the file
        return json.loads(tokenizer.to_str())["model"]["unk_id"]
    token = tokenizer.model.unk_token
    return None if token is None else tokenizer.token_to_id(token)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the highest token id, including added tokens (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


class TokenizerIdentity(NamedTuple):
    """Hashes that identify a tokenizer: by its file, and by the token ids that it produces.

    A tokenizer.json saved again by another program often has different bytes but produces the same ids.
    """

    file_hash: str | None
    """SHA-256 of the tokenizer.json; None: not recorded."""

    encoding_hash: str | None
    """See function ``encoding_hash``; None: not recorded."""

    @classmethod
    def recorded(cls, data: Mapping[str, Any]) -> TokenizerIdentity:
        """Return the identity recorded in a checkpoint's metadata about its data."""
        return cls(data.get("tokenizer_hash"), data.get("encoding_hash"))

    def is_same(self, other: TokenizerIdentity) -> bool:
        """Return whether both produce the same ids, as far as the hashes tell."""
        if self.encoding_hash is not None and self.encoding_hash == other.encoding_hash:
            return True
        return self.file_hash == other.file_hash


def tokenizer_identity(path: str | Path, tokenizer: Tokenizer | None = None) -> TokenizerIdentity:
    """Return the identity of the tokenizer.json at ``path``; pass the ``tokenizer`` if it is already loaded."""
    tokenizer = load_tokenizer(str(path)) if tokenizer is None else tokenizer
    return TokenizerIdentity(tokenizer_hash(path), encoding_hash(tokenizer))


def encoding_hash(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 of the vocabulary and of the ids of ``PROBE`` and of every token's own text.

    It ignores what does not affect training: templates that add special tokens, truncation and padding.
    """
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items())
    texts = [PROBE, *(token for token, _ in vocabulary)]
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    content = json.dumps([vocabulary, [encoding.ids for encoding in encodings]])
    return hashlib.sha256(content.encode()).hexdigest()


def tokenizer_hash(path: str | Path) -> str:
    """Return the SHA-256 of a tokenizer.json in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _read_tokenizer(name_or_path: str) -> tuple[Tokenizer, Path]:
    path = tokenizer_path(name_or_path)
    try:
        file = path or _downloaded(name_or_path)
        return Tokenizer.from_file(str(file)), file
    except UserError as error:
        raise UserError(
            f"data.tokenizer='{name_or_path}' is not a file or folder: {error}, or set null to train one"
        ) from error
    # The library raises plain Exception; for the hub, it passes on errors of its HTTP client.
    except Exception as error:
        reason = first_line(error)
        if path is not None:
            raise UserError(
                f"data.tokenizer: {path} is not a valid tokenizer.json: {reason}; pass another, or null to train one"
            ) from error
        raise UserError(
            f"data.tokenizer='{name_or_path}' is not a file or folder, and could not be loaded from the Hugging Face "
            f"hub: {reason}; pass the path of a tokenizer.json, or null to train one"
        ) from error


def _downloaded(name: str) -> Path:
    """Return the tokenizer.json of a name on the hub, in its cache, with the files that may name its end token."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # slow to import
    from huggingface_hub.errors import EntryNotFoundError

    with asking_hub(f"the tokenizer '{name}'"):
        path = Path(hf_hub_download(name, TOKENIZER_FILE))
        for file in _NAMING_THE_END:
            with suppress(EntryNotFoundError):
                hf_hub_download(name, file)
    if try_to_load_from_cache(name, TOKENIZER_CONFIG) is None:
        print(
            f"the cache of the Hugging Face hub has no {TOKENIZER_CONFIG} of '{name}', which may name another "
            "end-of-document token than the usual one of its vocabulary",
            file=sys.stderr,
        )
    return path


def _for_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Make the tokenizer encode whole texts as they are: no truncation, padding, dropout or added tokens, and the name
    of a special token in a text is text.
    """
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None  # of merges, by which a text would have other ids each time
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]  # templates add special tokens
    tokenizer.encode_special_tokens = True
    return tokenizer


def _end_token_in(file: Path) -> str | None:
    if not file.is_file():
        return None
    try:
        token = load_json(file).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"data.tokenizer: could not read {file}: {error}; repair or remove it") from error
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
