"""Call a tokenizer; if it fails, panics or takes too long, raise an error that names the document."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

from mmcache.errors import CorpusError, UnsupportedModelError
from mmcache.extraction.corpus import check_size
from mmcache.models.tokenizer import panics_as_errors, said

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ids_of_letter", "ids_of_texts"]

# Timeout in seconds: per call, and in addition per million characters, which take 1 to 12 s as measured.
_SECONDS, _SECONDS_A_MILLION = 60.0, 600.0


def ids_of_texts(tokenizer: Any, texts: Sequence[str], first: int) -> list[list[int]]:
    """The token ids of each text, without special tokens; documents are numbered from `first` on.

    Raises:
        CorpusError: the tokenizer fails on a text or takes minutes, or memory does not suffice.
    """
    for number, text in enumerate(texts, first):
        if len(text) >> 20:
            check_size(len(text.encode()), f"document {number}", "cut it into several documents")
    characters = sum(map(len, texts))
    seconds = _SECONDS + _SECONDS_A_MILLION * characters / 1e6
    last = first + len(texts) - 1
    which = f"document {first}" if len(texts) == 1 else f"documents {first} to {last}"
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    try:
        return list(_ids(tokenizer, texts, seconds, **options))
    except TimeoutError as error:
        longest = max(texts, key=len)
        raise CorpusError(
            f"{which}: the tokenizer was not done with {characters:,} characters after {seconds:,.0f} seconds; the "
            f"longest, document {first + texts.index(longest)}, has {len(longest):,} of them: cut it, or leave it out"
        ) from error
    except Exception as error:
        for number, text in enumerate(texts, first):
            try:
                _ids(tokenizer, [text], seconds, **options)
            except Exception as own:
                raise CorpusError(f"document {number} cannot be tokenised: {said(own)}") from own
        raise CorpusError(f"{which} cannot be tokenised together: {said(error)}") from error


def ids_of_letter(tokenizer: Any, *, special: bool) -> list[int]:
    """The token ids of the text "a", with the special tokens around it or without.

    Raises:
        UnsupportedModelError: the tokenizer fails even on that.
    """
    try:
        return list(_ids(tokenizer, "a", _SECONDS, add_special_tokens=special))
    except TimeoutError as error:
        raise UnsupportedModelError(
            f"the tokenizer was not done with the text 'a' after {_SECONDS:.0f} seconds: give the model's own"
        ) from error
    except Exception as error:
        raise UnsupportedModelError(
            f"the tokenizer fails on the text 'a': {said(error)}; give the model's own"
        ) from error


def _ids(tokenizer: Any, texts: str | Sequence[str], seconds: float, **options: bool) -> Any:
    """The tokenizer's `input_ids` for `texts`. After `seconds` raises TimeoutError; its thread cannot be ended.

    The call runs in a thread of its own, so that the caller stays interruptible; native code is not.
    """
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            with panics_as_errors():
                done.put((tokenizer(texts, **options)["input_ids"], None))
        except BaseException as error:  # noqa: BLE001 -- raised again in the caller's thread
            done.put((None, error))

    thread = threading.Thread(target=work, name="mmcache-tokenizer", daemon=True)
    thread.start()
    try:
        found, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    thread.join()
    if error is not None:
        raise error
    return found
