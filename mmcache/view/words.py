"""Tokens as text, by the tokenizer that the store keeps; ids where it keeps none."""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import ArgumentError, CorruptError
from mmcache.models.tokenizer import growth, panics_as_errors
from mmcache.read.store import a_store
from mmcache.system.arguments import instance, public

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mmcache.read.store import Store

__all__ = ["Words", "a_words", "surroundings"]

# A token's text is cut behind so many bytes: none is that long but in a file that was made to take memory.
_LONGEST = 1 << 10
# Nor is one decoded that a decoder's replacements may make longer than this.
_LARGEST = 1 << 20


def _byte_level() -> dict[str, int]:
    """Give the letters by which byte-level tokenizers write bytes (GPT-2's `bytes_to_unicode`), and the bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


class Words:
    """The text of each token of a store, as the bytes that it adds.

    Args:
        store: its tokenizer is read at once.

    Raises:
        CorruptError, StoreNotFoundError: the store's tokenizer is damaged, or gone.
    """

    @public(store=a_store)
    def __init__(self, store: Store) -> None:
        text = store.tokenizer_json()
        self._tokenizer: Any = None
        self._where = store.where
        self._pieces: dict[int, bytes] = {}
        if text is None:
            return
        try:
            import tokenizers  # noqa: PLC0415 -- an extra
        except ImportError:
            return
        try:
            with panics_as_errors():
                self._tokenizer = tokenizers.Tokenizer.from_str(text)
            decoder = json.loads(text).get("decoder")
            self._letters = _byte_level() if _is_byte_level(decoder) else None
            self._growth = growth(decoder)
        except Exception as error:  # it raises nothing narrower
            raise CorruptError(f"{store.where}: the tokenizer that it keeps cannot be read ({error})") from error
        self._added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer; else texts are ids."""
        return self._tokenizer is not None

    @property
    def size(self) -> int:
        """How many ids have a text."""
        return int(self._tokenizer.get_vocab_size()) if self.known else 0

    def bytes_of(self, token: int) -> bytes:
        """Give the bytes that a token adds to the text; its id between angle brackets where that is not known."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._bytes_of(token)[:_LONGEST]
        return found

    def _bytes_of(self, token: int) -> bytes:
        name = self._tokenizer.id_to_token(token) if self.known and token >= 0 else None
        if name is None:
            return f"⟨{token}⟩".encode()
        if name in self._added:
            return str(name).encode()
        if self._letters is not None and all(letter in self._letters for letter in name):
            return bytes(self._letters[letter] for letter in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        if len(name) * self._growth > _LARGEST:
            return str(name).encode()
        # What it adds behind another, since some decoders take the space off the first.
        try:
            with panics_as_errors():
                once, twice = self._tokenizer.decode_batch([[token], [token, token]], skip_special_tokens=False)
        except Exception as error:  # as above
            raise CorruptError(
                f"{self._where}: the tokenizer that it keeps fails on token {token} ({error})"
            ) from error
        return str(twice[len(once) :]).encode()

    def texts(self, tokens: Iterable[int]) -> list[str]:
        """Give the text of each token; of one that is a part of a letter, the replacement character."""
        return [self.bytes_of(int(token)).decode(errors="replace") for token in tokens]

    @cached_property
    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of all ids, one after the other, and where each begins: `[bytes]` uint8, `[size + 1]` int64."""
        pieces = [self.bytes_of(token) for token in range(self.size)]
        starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
        return np.frombuffer(b"".join(pieces), np.uint8), starts


def _is_byte_level(decoder: Any) -> bool:
    """Tell whether a tokenizer's decoder is the byte-level one, alone or among others."""
    if not isinstance(decoder, dict):
        return False
    inner = decoder.get("decoders", [])
    return decoder.get("type") == "ByteLevel" or any(_is_byte_level(one) for one in inner)


a_words = instance(Words, "mmcache.view.Words(store)")


def surroundings(store: Store, position: int, context: int, words: Words, width: int = 1) -> dict[str, str]:
    """Give the text of some tokens, and of those around them in the same sequence.

    Raises:
        ArgumentError: `context` below 0.
    """
    if context < 0:
        raise ArgumentError(f"context is {context}: expected 0 or more")
    span = store.sequences[store.sequences.find(position)]
    first, last = max(span.start, position - context), min(span.stop, position + width + context)
    texts = [words.bytes_of(int(token)) for token in store.read_tokens(first, last)]
    at = position - first
    parts = {"before": texts[:at], "text": texts[at : at + width], "after": texts[at + width :]}
    return {name: b"".join(part).decode(errors="replace") for name, part in parts.items()}
