"""Tokenise documents, cut them into contexts (the token ids of one sequence of the model), and store the tokens.

The progress is kept in the root, as `source["tokenised"]`: tokens and sequences stored, where the next context
begins, and a hash of the documents that were used. A second call resumes there.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mmcache.errors import ArgumentError, CorpusError, PlanMismatchError, UnsupportedModelError
from mmcache.extraction.special_tokens import frame_of, unframed, warn_of_framed, warn_of_missing
from mmcache.extraction.tokenizer_calls import ids_of_texts
from mmcache.format.names import RESERVED
from mmcache.format.token_flags import flagged
from mmcache.write.token_columns import Column, publish_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from mmcache.extraction.corpus import Document
    from mmcache.extraction.special_tokens import Bos
    from mmcache.format.manifest import Manifest

__all__ = [
    "Context",
    "Contexts",
    "CorpusDigest",
    "CorpusPosition",
    "Tokenised",
    "check_corpus",
    "checked_texts",
    "tokenise",
]

# Limits per call of the tokenizer: enough text for its threads, in bounded memory.
_TOGETHER_CHARACTERS = 1 << 20
_TOGETHER_TEXTS = 1 << 10
_NOTHING = np.empty(0, np.int32)


@dataclass(frozen=True)
class CorpusPosition:
    """Where in the corpus a context begins: at token `offset` of document number `document`."""

    document: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Context:
    """Token ids `[n]` int32 of one sequence; `document` is the first one in it, `after` where the next context begins.

    `framed` counts the documents that begin in it and already have special tokens which would be put around them.
    """

    tokens: np.ndarray
    document: int
    after: CorpusPosition
    framed: int = 0


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
        """Add the next document."""
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
        """A copy of the current state."""
        copied = CorpusDigest()
        copied.documents, copied._hash = self.documents, self._hash.copy()
        return copied

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


class Contexts:
    """Cuts documents into contexts, with the special tokens that the tokenizer wants around each.

    Args:
        tokenizer: a Hugging Face tokenizer.
        context_length: the most tokens per context, special ones included.
        vocabulary: the model's ids are below this; None if unknown.
        pack: fill each context with consecutive documents, which then see each other, instead of beginning a new
            context with each document.
        bos: whether texts get a BOS, as in `frame_of`.
        model_bos: the BOS of the model's configuration.
        doubled: put special tokens around a text even if it already has them, as in format version 1.

    Nothing is put around documents that are token ids already, but `pack` joins them as it does texts.

    Raises:
        ArgumentError: a context has no room for a token between the special ones; there is no BOS to add.
        UnsupportedModelError: the model has no rows for the special tokens, or the tokenizer fails on any text.
    """

    def __init__(
        self,
        tokenizer: Any,
        context_length: int,
        vocabulary: int | None = None,
        *,
        pack: bool = False,
        bos: Bos = "auto",
        model_bos: int | None = None,
        doubled: bool = False,
    ) -> None:
        self._tokenizer, self._length, self._vocabulary, self._pack = tokenizer, context_length, vocabulary, pack
        self.frame, self._doubled = frame_of(tokenizer, bos, model_bos, vocabulary), doubled
        if context_length <= len(self.frame):
            raise ArgumentError(
                f"context_length is {context_length}: expected more than the {len(self.frame)} special tokens that "
                f"are put around each context"
            )
        end = getattr(tokenizer, "eos_token_id", None)
        between = self.frame.after if len(self.frame.after) else self.frame.before
        self._between = between if len(between) or end is None else np.array([end], np.int32)
        put = np.concatenate([self.frame.before, self.frame.after, self._between if pack else _NOTHING])
        if vocabulary is not None and (put >= vocabulary).any():
            raise UnsupportedModelError(
                f"the tokenizer puts token ids up to {put.max()} around texts, and the model's embedding has "
                f"{vocabulary} rows: give the model's own tokenizer, or one that model.resize_token_embeddings knows"
            )

    def cut(self, documents: Iterable[Document], start: CorpusPosition | None = None) -> Iterator[Context]:
        """The contexts of documents, in order, from `start` on; documents without tokens have none.

        Raises:
            CorpusError: a document is neither text nor token ids, an id is not in the model's vocabulary, the
                tokenizer fails on a text or takes minutes, or memory does not suffice for it.
        """
        start = start or CorpusPosition()
        tokenised = self._tokenise(documents, start.document)
        return self._packed(tokenised, start) if self._pack else self._apart(tokenised, start)

    def _tokenise(self, documents: Iterable[Document], first: int) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Number, ids `[n]`, and whether it is a text, of each document; numbers start at `first`."""
        number = first
        for some in _together(documents, first):
            if isinstance(some, np.ndarray):
                yield number, self._checked(some, number), False
                number += 1
                continue
            for ids in ids_of_texts(self._tokenizer, some, number):
                yield number, self._checked(np.asarray(ids, np.int64), number), True
                number += 1

    def _checked(self, ids: np.ndarray, number: int) -> np.ndarray:
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise CorpusError(f"document {number} is {ids.dtype} {list(ids.shape)}: expected token ids [n]")
        high = (2**31 if self._vocabulary is None else self._vocabulary) - 1
        if len(ids) and not (ids.min() >= 0 and ids.max() <= high):
            raise CorpusError(
                f"document {number} has token ids from {ids.min()} to {ids.max()}: the model knows 0 to {high}; "
                f"was it tokenised for another model, or by a tokenizer that was extended without the model?"
            )
        # Not converted: it may be a memory-mapped file larger than memory, which is cut context by context.
        return ids

    def _apart(self, tokenised: Iterable[tuple[int, np.ndarray, bool]], start: CorpusPosition) -> Iterator[Context]:
        for number, whole, is_text in tokenised:
            before, after = (self.frame.before, self.frame.after) if is_text else (_NOTHING, _NOTHING)
            ids = self._unframed(whole, before, after)
            window = self._length - len(before) - len(after)
            for at in range(start.offset if number == start.document else 0, len(ids), window):
                # A part in the middle of a text may begin with a BOS in the text, or end with an EOS.
                part = self._unframed(ids[at : at + window], before, after)
                if len(part):
                    more = len(self._unframed(ids[at + window :], before, after))
                    behind = CorpusPosition(number, at + window) if more else CorpusPosition(number + 1)
                    framed = int(at == 0 and len(ids) < len(whole))
                    tokens = np.concatenate([before, part.astype(np.int32), after])
                    yield Context(tokens, number, behind, framed)

    def _packed(self, tokenised: Iterable[tuple[int, np.ndarray, bool]], start: CorpusPosition) -> Iterator[Context]:
        before, room = self.frame.before, self._length - len(self.frame.before)
        parts: list[np.ndarray] = []
        filled = framed = 0
        document = start.document
        for number, ids, _ in tokenised:
            at = start.offset if number == start.document else 0
            whole, own = self._separated(ids)
            framed += own and not at
            while at < len(whole):
                if not parts:
                    # The context begins with `before`, so skip a separator or the document's own BOS.
                    document, at = number, len(whole) - len(self._unframed(whole[at:], before, _NOTHING))
                some = whole[at : at + room - filled]
                if not len(some):
                    break
                parts.append(some)
                at, filled = at + len(some), filled + len(some)
                if filled == room:
                    more = len(self._unframed(whole[at:], before, _NOTHING))
                    behind = CorpusPosition(number, at) if more else CorpusPosition(number + 1)
                    yield Context(np.concatenate([before, *parts]), document, behind, framed)
                    parts, filled, framed = [], 0, 0
        if parts:
            yield Context(np.concatenate([before, *parts]), document, CorpusPosition(number + 1), framed)

    def _separated(self, ids: np.ndarray) -> tuple[np.ndarray, bool]:
        """A document with the separator after it, and whether it already has special tokens that are put around it.

        If the BOS is the separator, each document has one before it, and its own is removed. If an EOS is, a document's
        own BOS stays, except at the beginning of a context.
        """
        inner = self._unframed(ids, self.frame.before, self._between)
        if not len(inner):
            return inner, False
        core = inner if self._between is self.frame.before else self._unframed(ids, _NOTHING, self._between)
        return np.concatenate([core.astype(np.int32), self._between]), len(inner) < len(ids)

    def _unframed(self, ids: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        return ids if self._doubled else unframed(ids, before, after)


def _check_document(number: int, document: object) -> None:
    """Refuse a document that is neither text nor an array of token ids.

    Raises:
        CorpusError: with the document's number and type.
    """
    if isinstance(document, str):
        _check_text(document, number)
    elif not isinstance(document, np.ndarray):
        raise _no_document(number, document)


def checked_texts(texts: Iterable[Document]) -> Iterable[Document]:
    """The documents, after a check of the first, so that a wrong corpus is refused before anything is written.

    Raises:
        ArgumentError, CorpusError: `texts` is no sequence of documents, or its first is none.
    """
    one = isinstance(texts, str | bytes | PurePath)
    try:
        documents = iter(() if one else texts)
    except TypeError:
        one = True
    if one:
        raise ArgumentError(
            f"texts is one {type(texts).__name__}: give a sequence of documents; mmcache.read_texts reads files"
        )
    first = list(islice(documents, 1))
    for document in first:
        _check_document(0, document)
    return chain(first, documents) if documents is texts else texts


def _together(documents: Iterable[Document], first: int) -> Iterator[list[str] | np.ndarray]:
    """Lists of texts to tokenise in one call each, and single arrays, in order."""
    some: list[str] = []
    size = 0
    for number, document in enumerate(documents, first):
        _check_document(number, document)
        if isinstance(document, np.ndarray):
            if some:
                yield some
            some, size = [], 0
            yield document
        else:
            some.append(document)
            size += len(document)
            if size >= _TOGETHER_CHARACTERS or len(some) >= _TOGETHER_TEXTS:
                yield some
                some, size = [], 0
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


# Tokens between two commits of tokenised text: 16 MiB of ids.
_TOKENS_A_COMMIT = 1 << 22


@dataclass(frozen=True)
class Tokenised:
    """The progress of tokenising the corpus.

    `documents` is the number of documents used, and `sha256` their hash. The next context begins in document `document`
    at token `offset`. `whole`: the corpus ended there. `framed` counts documents that already had special tokens which
    would be put around them.
    """

    tokens: int = 0
    sequences: int = 0
    document: int = 0
    offset: int = 0
    documents: int = 0
    sha256: str = ""
    whole: bool = False
    framed: int = 0

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The progress in a store's root."""
        return cls(**manifest.source.get("tokenised", {}))

    def to_json(self) -> dict[str, Any]:
        """The entry of a store's root; without `framed` if it is 0, as in version 1 of the format."""
        said = asdict(self)
        return said if self.framed else {name: value for name, value in said.items() if name != "framed"}


class _Hashed:
    """Passes documents to the tokenizer, which reads ahead, and keeps the hash as of each recent document."""

    def __init__(self, documents: Iterable[Document], before: Tokenised, where: Path) -> None:
        self._documents, self._before, self._where = documents, before, where
        self._recent: deque[tuple[int, CorpusDigest]] = deque()
        self.digest = CorpusDigest()

    def __iter__(self) -> Iterator[Document]:
        for number, document in enumerate(self._documents):
            self.digest.add(document)
            if number + 1 == self._before.documents:
                _compare(self._where, self._before, self.digest)
            if number >= self._before.document:
                self._recent.append((number, self.digest.copy()))
                yield document
        if self.digest.documents < self._before.documents:
            _compare(self._where, self._before, self.digest)

    def after(self, document: int) -> CorpusDigest:
        """The hash of all documents up to and including number `document`; forgets earlier hashes."""
        while self._recent[0][0] < document:
            self._recent.popleft()
        return self._recent[0][1]


def _compare(where: Path, before: Tokenised, found: CorpusDigest) -> None:
    if (found.documents, found.hexdigest()) != (before.documents, before.sha256):
        raise PlanMismatchError(
            f"{where} was planned with another corpus: its first {before.documents} documents hash to "
            f"{before.sha256[:16]}…, those given ({found.documents} of them) to {found.hexdigest()[:16]}…. "
            f"Give the corpus of the store in the same order, or choose another path"
        )


def check_corpus(where: Path, done: Tokenised, documents: Iterable[Document]) -> None:
    """Compare documents with those of a plan, by their hash; tokenises nothing.

    Raises:
        PlanMismatchError: they differ, or there are more although the plan used its whole corpus.
    """
    digest = CorpusDigest()
    for document in documents:
        if digest.documents == done.documents:
            if done.whole:
                raise PlanMismatchError(
                    f"{where} was planned with a corpus of {done.documents} documents, and more are given now: "
                    f"give the corpus of the store, or choose another path"
                )
            break
        digest.add(document)
    _compare(where, done, digest)


def tokenise(
    path: Path,
    manifest: Manifest,
    contexts: Contexts,
    documents: Iterable[Document],
    max_tokens: int | None,
    commit: Callable[[Tokenised], None],
) -> Tokenised:
    """Tokenise and store tokens, flags and sequences from where the plan ended, in bounded memory.

    Args:
        path: the store.
        manifest: its root; resumes at `source["tokenised"]`.
        contexts: cuts the documents.
        documents: the whole corpus, from its first document on.
        max_tokens: stop before the context that would exceed this number; None for all.
        commit: writes each intermediate state to the root. The last state is returned; the caller writes it.

    Raises:
        PlanMismatchError: the documents that were used before differ now.
        CorpusError: there are no tokens at all.
    """
    state = Tokenised.of(manifest)
    totals = {"tokens": state.tokens, "flags": state.tokens, "sequences": state.sequences}
    columns = {array: Column(path, manifest, array, totals[array]) for array in RESERVED}
    special = np.array(manifest.special_tokens, np.int64)
    hashed = _Hashed(documents, state, path)
    place, tokens, committed, full = CorpusPosition(state.document, state.offset), state.tokens, state.tokens, False
    used: CorpusDigest | None = None
    framed = state.framed
    warn_of_missing(contexts.frame)
    for context in contexts.cut(hashed, place):
        if max_tokens is not None and tokens + len(context.tokens) > max_tokens:
            full = True
            break
        _store(columns, context, tokens, special, first=manifest.flags_first)
        tokens, place, framed = tokens + len(context.tokens), context.after, framed + context.framed
        used = hashed.after(place.document if place.offset else place.document - 1)
        if tokens - committed >= _TOKENS_A_COMMIT:
            committed = tokens
            publish_columns(path, columns.values())
            commit(Tokenised(tokens, len(columns["sequences"]), **_at(place, used), framed=framed))
    if not full:
        used = hashed.digest
    if not tokens:
        raise CorpusError(_nothing(hashed.digest.documents, max_tokens if full else None))
    at = {**asdict(place), "documents": state.documents, "sha256": state.sha256} if used is None else _at(place, used)
    publish_columns(path, columns.values())
    if framed > state.framed:
        warn_of_framed(framed, at["documents"])
    return Tokenised(tokens, len(columns["sequences"]), **at, whole=not full, framed=framed)


def _at(place: CorpusPosition, used: CorpusDigest) -> dict[str, Any]:
    return {**asdict(place), "documents": used.documents, "sha256": used.hexdigest()}


def _store(columns: dict[str, Column], context: Context, start: int, special_ids: np.ndarray, *, first: bool) -> None:
    ids = context.tokens
    columns["tokens"].extend(ids)
    columns["flags"].extend(flagged(ids, special_ids, begins=True, first=first))
    columns["sequences"].extend(np.array([[start, start + len(ids), context.document]]))


def _nothing(documents: int, max_tokens: int | None) -> str:
    if max_tokens is not None:
        return f"max_tokens={max_tokens} has no room for the first context: raise it, or lower context_length"
    return f"the corpus has no tokens ({documents} documents): give files with text in them"
