"""Requests that are tried again: what may pass is waited for, and what will not pass is told at once."""

from __future__ import annotations

import random
import re
import time
from typing import TYPE_CHECKING, TypeVar

from mmcache.errors import AccessError, BucketNotFoundError, RemoteError, StoreNotFoundError
from mmcache.storage.connection import said
from mmcache.urls import concealed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["ShortError", "short_answer", "try_again"]

T = TypeVar("T")

# Seconds between two tries.
_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# How a refusal reads where the client gives it no class of its own, as for listings.
_FORBIDDEN = re.compile(r"AccessDenied|\b(401 Unauthorized|403 Forbidden)\b")
# How the answer reads where an object ends before the range begins.
_BEYOND = re.compile(r"InvalidRange|\b416 R")


class ShortError(Exception):
    """An answer that has fewer bytes than were asked for, and than there are."""


def short_answer(came: int, asked: int) -> ShortError:
    """Give the error for an answer of so many bytes."""
    return ShortError(f"{came} bytes came, {asked} were asked for")


def try_again(where: str, work: Callable[[], T], short: Callable[[], None], refusals: ModuleType, patience: float) -> T:
    """Do some work until it succeeds, or will not, or patience is over; blocks until then.

    Args:
        where: the object, for errors.
        work: a request, or some.
        short: called where an answer was too short: raises if the object is.
        refusals: the client's own errors.
        patience: seconds for which it is tried.

    Raises:
        StoreNotFoundError: there is no such object, or bucket.
        AccessError: no right to it.
        RemoteError: no whole answer in all that time.
    """
    began, pause = time.monotonic(), _PAUSE
    while True:
        try:
            return work()
        except (ShortError, FileNotFoundError, RemoteError, refusals.BaseError) as error:
            failure: Exception = error
        # Behind the block, so that what is raised does not carry the client's own words, which may hold a password.
        if not isinstance(failure, ShortError | RemoteError):
            _refuse(where, failure, refusals)
        if isinstance(failure, ShortError) or _BEYOND.search(str(failure)):
            short()
        if time.monotonic() - began + pause > patience:
            raise RemoteError(
                f"{where}: no whole answer for {time.monotonic() - began:.0f} s ({said(failure)}). What is there "
                f"stays there: see that the server can be reached, and run it again"
            ) from concealed(failure)
        time.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 -- so that clients do not come all at once
        pause = min(2 * pause, _LONGEST_PAUSE)


def _not_found(where: str, error: Exception) -> StoreNotFoundError:
    if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
        return BucketNotFoundError(2, "there is no such bucket: make it first, or correct the address", where)
    return StoreNotFoundError(2, "there is no such object", where)


def _refuse(where: str, error: Exception, refusals: ModuleType) -> None:
    """Raise for what trying again does not change."""
    text = str(error)
    if isinstance(error, StoreNotFoundError):
        raise error
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in text or "ContainerNotFound" in text:
        raise _not_found(where, error) from concealed(error)
    if isinstance(error, refusals.PermissionDeniedError | refusals.UnauthenticatedError) or _FORBIDDEN.search(text):
        raise AccessError(
            13, f"the server refuses ({said(error)}): the credentials are wrong, or have no right to it", where
        ) from concealed(error)
    if isinstance(error, refusals.NotSupportedError | refusals.InvalidPathError):
        raise RemoteError(f"{where}: {said(error)}") from concealed(error)
