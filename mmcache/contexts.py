"""Documents to contexts: the runs of token ids that the model sees at once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import ArgumentError, CorpusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mmcache.corpus import Document

__all__ = ["Context", "Contexts", "CorpusDigest", "Place"]

# Texts are tokenised together up to this many characters: enough for the tokenizer's threads, and bounded.
_TOGETHER_CHARACTERS = 1 << 20
_TOGETHER_TEXTS = 1 << 10


@dataclass(frozen=True)
class Place:
    """Where in the corpus a context begins: in document number `document`, at its token number `offset`."""

    document: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Context:
    """What the model sees at once: token ids `[n]` int32; `document` is the first one in it, `after` what follows."""

    tokens: np.ndarray
    document: int
    after: Place


def _no_document(number: int, found: object) -> CorpusError:
    return CorpusError(
        f"document {number} is a {type(found).__name__}: expected text or an array of token ids "
        f"(files are read with mmcache.read_texts)"
    )


class CorpusDigest:
    """A running hash of documents: their number, and SHA-256 over the length and bytes of each."""

    def __init__(self) -> None:
        self.documents = 0
        self._hash = hashlib.sha256()

    def add(self, document: Document) -> None:
        """Take in the next document."""
        if isinstance(document, str):
            body: Any = document.encode("utf-8", "surrogatepass")
            self._hash.update(b"t" + len(body).to_bytes(8, "little"))
            self._hash.update(body)
        elif not isinstance(document, np.ndarray):
            raise _no_document(self.documents, document)
        else:
            self._hash.update(b"i" + len(document).to_bytes(8, "little"))
            for start in range(0, len(document), 1 << 20):
                self._hash.update(np.asarray(document[start : start + (1 << 20)]).astype("<i8").tobytes())
        self.documents += 1

    def copy(self) -> CorpusDigest:
        """Give the hash as it is now, to be kept while this one goes on."""
        copied = CorpusDigest()
        copied.documents, copied._hash = self.documents, self._hash.copy()
        return copied

    def hexdigest(self) -> str:
        """Give the hash so far."""
        return self._hash.hexdigest()


class Contexts:
    """Cuts documents into contexts, with the special tokens that the tokenizer wants around each.

    Args:
        tokenizer: a Hugging Face tokenizer.
        context_length: tokens a context at most, special ones included.
        vocabulary: ids that the model knows are below this; None if that is not known.
        pack: fill each context with the documents one after the other, which then see each other, instead of
            beginning a new context with each document.

    Documents that are token ids already are cut as they are: nothing is put around them. Packed, they are put
    one after the other as texts are.

    Raises:
        ArgumentError: a context has no room for a token between the special ones.
    """

    def __init__(
        self, tokenizer: Any, context_length: int, vocabulary: int | None = None, *, pack: bool = False
    ) -> None:
        self._tokenizer, self._length, self._vocabulary, self._pack = tokenizer, context_length, vocabulary, pack
        self._before, self._after = _frame(tokenizer)
        special = len(self._before) + len(self._after)
        if context_length <= special:
            raise ArgumentError(
                f"context_length is {context_length}: expected more than the {special} special tokens that the "
                f"tokenizer puts around each context"
            )
        end = getattr(tokenizer, "eos_token_id", None)
        between = self._after if len(self._after) else self._before
        self._between = between if len(between) or end is None else np.array([end], np.int32)

    def cut(self, documents: Iterable[Document], start: Place | None = None) -> Iterator[Context]:
        """Give the contexts of documents, in order, from `start` on; documents without tokens have none.

        Raises:
            CorpusError: a document that is neither text nor token ids, or an id that the model does not know.
        """
        start = start or Place()
        tokenised = self._tokenise(documents, start.document)
        return self._packed(tokenised, start) if self._pack else self._apart(tokenised, start)

    def _tokenise(self, documents: Iterable[Document], first: int) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Give number, ids `[n]` int32 and whether they were text, of each document from `first` on."""
        number = first
        for some in _together(documents, first):
            if isinstance(some, np.ndarray):
                yield number, self._checked(some, number), False
                number += 1
                continue
            encoded = self._tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids in encoded["input_ids"]:
                yield number, self._checked(np.asarray(ids, np.int64), number), True
                number += 1

    def _checked(self, ids: np.ndarray, number: int) -> np.ndarray:
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise CorpusError(f"document {number} is {ids.dtype} {list(ids.shape)}: expected token ids [n]")
        high = (2**31 if self._vocabulary is None else self._vocabulary) - 1
        if len(ids) and not (ids.min() >= 0 and ids.max() <= high):
            raise CorpusError(
                f"document {number} has token ids from {ids.min()} to {ids.max()}: the model knows 0 to {high}; "
                f"was it tokenised for another model?"
            )
        return ids.astype(np.int32)

    def _apart(self, tokenised: Iterable[tuple[int, np.ndarray, bool]], start: Place) -> Iterator[Context]:
        special = len(self._before) + len(self._after)
        for number, ids, is_text in tokenised:
            window = self._length - special if is_text else self._length
            for at in range(start.offset if number == start.document else 0, len(ids), window):
                part = ids[at : at + window]
                tokens = np.concatenate([self._before, part, self._after]) if is_text else part
                done = at + window >= len(ids)
                yield Context(tokens, number, Place(number + 1) if done else Place(number, at + window))

    def _packed(self, tokenised: Iterable[tuple[int, np.ndarray, bool]], start: Place) -> Iterator[Context]:
        room = self._length - len(self._before)
        parts: list[np.ndarray] = []
        filled, document = 0, start.document
        for number, ids, _ in tokenised:
            whole = np.concatenate([ids, self._between]) if len(ids) else ids
            at = start.offset if number == start.document else 0
            while at < len(whole):
                if not parts:
                    document = number
                some = whole[at : at + room - filled]
                parts.append(some)
                at, filled = at + len(some), filled + len(some)
                if filled == room:
                    after = Place(number, at) if at < len(whole) else Place(number + 1)
                    yield Context(np.concatenate([self._before, *parts]), document, after)
                    parts, filled = [], 0
        if parts:
            yield Context(np.concatenate([self._before, *parts]), document, Place(number + 1))


def _together(documents: Iterable[Document], first: int) -> Iterator[list[str] | np.ndarray]:
    """Group texts into lists that are tokenised in one call; arrays come one by one."""
    some: list[str] = []
    size = 0
    for number, document in enumerate(documents, first):
        if isinstance(document, np.ndarray):
            if some:
                yield some
            some, size = [], 0
            yield document
        elif isinstance(document, str):
            _check_text(document, number)
            some.append(document)
            size += len(document)
            if size >= _TOGETHER_CHARACTERS or len(some) >= _TOGETHER_TEXTS:
                yield some
                some, size = [], 0
        else:
            raise _no_document(number, document)
    if some:
        yield some


def _check_text(document: str, number: int) -> None:
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"document {number} has half of a surrogate pair at character {error.start}, which is no text: "
            f"replace it, as by text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from error


def _frame(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Find the special tokens that the tokenizer puts before and behind a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return np.array(full[:start], np.int32), np.array(full[start + len(plain) :], np.int32)
    raise CorpusError(f"the tokenizer makes {full} of 'a', which does not hold its {plain} without special tokens")
