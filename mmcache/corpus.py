"""Text to contexts: files to documents, documents to runs of token ids that the model sees at once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import ArgumentError, CorpusError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Context", "Contexts", "read_texts"]

# Documents are tokenised together up to this many characters: enough for the tokenizer's threads, and bounded.
_TOGETHER_CHARACTERS = 1 << 20


def read_texts(paths: Iterable[str | os.PathLike[str]], *, field: str = "text") -> Iterator[str]:
    """Read documents from files, in the order given.

    Args:
        paths: `.jsonl` files hold one document a line, under `field`; every other file is one document, in
            UTF-8.
        field: the key of the text in JSON lines.

    Raises:
        CorpusError: a file that is not there, is not UTF-8, or a line that has no such field; line and file
            are named.
    """
    for path in map(Path, paths):
        try:
            if path.suffix.lower() == ".jsonl":
                yield from _read_jsonl(path, field)
            else:
                yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CorpusError(f"{path} is not UTF-8 at byte {error.start}: convert it first") from error
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}") from error


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CorpusError(
                    f"{path}, line {number}: no document under {field!r} ({error!r}); choose the key with --field"
                ) from error
            if not isinstance(text, str):
                raise CorpusError(f"{path}, line {number}: {field!r} is a {type(text).__name__}: expected text")
            yield text


@dataclass(frozen=True)
class Context:
    """What the model sees at once: token ids `[n]` int32, of document number `document`."""

    tokens: np.ndarray
    document: int


class Contexts:
    """Documents as contexts: each is cut into windows, with the special tokens that the tokenizer wants around each.

    Args:
        tokenizer: a Hugging Face tokenizer.
        context_length: tokens a context at most, special ones included.
        max_tokens: stop before the context that would pass this many; None for all.

    Attributes:
        documents, tokens: how many have been cut so far.
        digest: a running hash of the documents' text.

    Raises:
        ArgumentError: a context has no room for a token between the special ones.
    """

    def __init__(self, tokenizer: Any, context_length: int, max_tokens: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._before, self._after = _frame(tokenizer)
        self._window = context_length - len(self._before) - len(self._after)
        if self._window < 1:
            raise ArgumentError(
                f"context_length is {context_length}: expected more than the "
                f"{len(self._before) + len(self._after)} special tokens that the tokenizer puts around each context"
            )
        self._max_tokens = max_tokens
        self.documents = 0
        self.tokens = 0
        self.digest = hashlib.sha256()

    def cut(self, texts: Iterable[str]) -> Iterator[Context]:
        """Give the contexts of documents, in order; documents without tokens have none."""
        for some in _together(texts):
            encoded = self._tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for text, ids in zip(some, encoded["input_ids"], strict=True):
                body = text.encode("utf-8", "surrogatepass")
                self.digest.update(len(body).to_bytes(8, "little") + body)
                self.documents += 1
                for context in self._windows(ids):
                    if self._max_tokens is not None and self.tokens + len(context.tokens) > self._max_tokens:
                        return
                    self.tokens += len(context.tokens)
                    yield context

    def _windows(self, ids: Sequence[int]) -> Iterator[Context]:
        whole = np.asarray(ids, np.int32)
        for start in range(0, len(whole), self._window):
            part = whole[start : start + self._window]
            yield Context(np.concatenate([self._before, part, self._after]), self.documents - 1)


def _together(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into lists that are tokenised in one call."""
    some: list[str] = []
    size = 0
    for text in texts:
        if not isinstance(text, str):
            raise CorpusError(f"a document is a {type(text).__name__}: expected text (files are read with read_texts)")
        some.append(text)
        size += len(text)
        if size >= _TOGETHER_CHARACTERS:
            yield some
            some, size = [], 0
    if some:
        yield some


def _frame(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Find the special tokens that the tokenizer puts before and behind a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return np.array(full[:start], np.int32), np.array(full[start + len(plain) :], np.int32)
    raise CorpusError(f"the tokenizer makes {full} of 'a', which does not hold its {plain} without special tokens")
