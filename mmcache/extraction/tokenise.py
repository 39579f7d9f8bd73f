"""The tokens of a plan: documents are cut and stored until the corpus or `max_tokens` ends, resumably.

How far it got is kept in the root, as `source["tokenised"]`: tokens and sequences stored, where the next context
begins, and a hash of the documents that were used. A second call goes on from there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mmcache.errors import CorpusError, PlanMismatchError
from mmcache.extraction.contexts import Context, Contexts, CorpusDigest, Place
from mmcache.extraction.special_tokens import warn_of_framed, warn_of_missing
from mmcache.format.names import RESERVED
from mmcache.format.token_flags import flagged
from mmcache.write.token_columns import Column, publish_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from mmcache.extraction.corpus import Document
    from mmcache.format.manifest import Manifest

__all__ = ["Tokenised", "check_corpus", "tokenise"]

# Tokens between two commits of what was tokenised: 16 MiB of ids.
_TOKENS_A_COMMIT = 1 << 22


@dataclass(frozen=True)
class Tokenised:
    """How far the corpus was tokenised.

    `documents` were used, whose hash is `sha256`; the next context begins in document `document` at token
    `offset`; `whole` says that the corpus ended there. `framed` documents of contexts brought special tokens
    themselves which would be put around them.
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
        """Read it from a store's root."""
        return cls(**manifest.source.get("tokenised", {}))

    def to_json(self) -> dict[str, Any]:
        """What a store's root says; nothing of `framed` where there are none, as in version 1 of the format."""
        said = asdict(self)
        return said if self.framed else {name: value for name, value in said.items() if name != "framed"}


class _Hashed:
    """Documents on their way to the tokenizer, which reads ahead: the hash as of each of the last ones is kept."""

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
        """Give the hash of all documents up to and with number `document`; those before it are forgotten."""
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
    """Compare documents with those that a plan was made of; reads them, and tokenises nothing.

    Raises:
        PlanMismatchError: they differ, or there are more where the plan used all.
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
    """Store tokens, flags and sequences from where the plan got to, in bounded memory.

    Args:
        path: the store.
        manifest: its root, whose `source["tokenised"]` says where to go on.
        contexts: cuts the documents.
        documents: the whole corpus, from its first document on.
        max_tokens: stop before the context that would pass this many; None for all.
        commit: called with each state that is stored; it keeps it. The last one is given, and the caller's to keep.

    Raises:
        PlanMismatchError: the documents that were used before are others now.
        CorpusError: there are no tokens at all.
    """
    state = Tokenised.of(manifest)
    totals = {"tokens": state.tokens, "flags": state.tokens, "sequences": state.sequences}
    columns = {array: Column(path, manifest, array, totals[array]) for array in RESERVED}
    special = np.array(manifest.special_tokens, np.int64)
    hashed = _Hashed(documents, state, path)
    place, tokens, committed, full = Place(state.document, state.offset), state.tokens, state.tokens, False
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


def _at(place: Place, used: CorpusDigest) -> dict[str, Any]:
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
