"""Connections to object storage: client, credentials, and which requests are retried for how long.

S3 and compatible servers, Google Cloud Storage, Azure and `file://`, through obstore.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from mmcache.errors import AccessError, ArgumentError, BucketNotFoundError, RemoteError, StoreNotFoundError
from mmcache.urls import SCHEMES, address, concealed, is_url

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["ShortError", "client_library", "connect", "placed", "said", "short_answer", "try_again"]

# Timeouts in seconds: to connect, between two pieces of an answer, and of a whole request.
_CONNECT, _SILENCE, _REQUEST = 10, 30, 600
# The client's own retries, and the longest pause between them (s). Few, since `try_again` retries too, and can be
# interrupted.
_CLIENT_TIMES, _CLIENT_PAUSE = 4, 1
_KEY_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
                  "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE")  # fmt: skip


def placed(path: str | os.PathLike[str]) -> str | Path:
    """The location of a store: an object storage URL, with secrets removed, or a folder.

    Raises:
        ArgumentError: a URL of another kind, such as `https://…`.
    """
    if is_url(path):
        return address(str(path))
    if "://" in str(path):
        raise ArgumentError(
            f"{str(path)!r}: expected a folder, or an address such as s3://bucket/acts ({', '.join(SCHEMES)})"
        )
    return Path(path)


def said(error: Exception) -> str:
    """The text of a client's error without its debug part, at most 400 characters."""
    return " ".join(str(error).partition("\n\nDebug source")[0].split())[:400]


def client_library() -> ModuleType:
    """The module obstore. Raises ArgumentError if it is not installed."""
    try:
        import obstore  # noqa: PLC0415 -- an extra
        import obstore.exceptions  # noqa: PLC0415 -- as above
        import obstore.store  # noqa: PLC0415 -- as above
    except ImportError as error:
        raise ArgumentError("object storage needs obstore: pip install 'mmcache[remote]'") from error
    return obstore


def connect(url: str, obstore: ModuleType, patience: float) -> Any:
    """A client for a prefix; sends no request yet.

    Args:
        url: the prefix.
        obstore: the module, from `client_library`.
        patience: seconds for which the caller retries; the client itself retries for half of them.

    Raises:
        ArgumentError: the URL is not valid.
        AccessError: there are no credentials.
    """
    if url.startswith("file://"):
        return _made(url, obstore, {})
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=_CONNECT),
        "read_timeout": timedelta(seconds=_SILENCE),
        # For a whole request: long enough for a large part over a slow connection.
        "timeout": timedelta(seconds=_REQUEST),
    }
    options: dict[str, Any] = {
        "client_options": client,
        "retry_config": {
            "max_retries": _CLIENT_TIMES,
            "retry_timeout": timedelta(seconds=patience / 2),
            "backoff": {
                "init_backoff": timedelta(seconds=0.1),
                "max_backoff": timedelta(seconds=_CLIENT_PAUSE),
                "base": 2,
            },
        },
    }
    if url.startswith("s3"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))
        _check_endpoint(endpoint)
        if endpoint.startswith("http://"):
            client["allow_http"] = True
        options |= {"copy_if_not_exists": "multipart"} | _amazon(url)
    return _made(url, obstore, options)


def _check_endpoint(endpoint: str) -> None:
    """Check an endpoint's port: with an invalid one, obstore would panic."""
    try:
        _ = urlsplit(endpoint).port
    except ValueError as error:
        raise ArgumentError(f"the endpoint {endpoint!r} in AWS_ENDPOINT_URL is no address: {error}") from None


def _made(url: str, obstore: ModuleType, options: dict[str, Any]) -> Any:
    try:
        return obstore.store.from_url(url, **options)
    except (obstore.exceptions.BaseError, ValueError) as error:
        failure = error
    raise ArgumentError(f"{url}: {said(failure)}") from concealed(failure)


def _amazon(url: str) -> dict[str, Any]:
    """Client options for S3: boto3's credentials, if the environment has none that obstore finds itself."""
    if any(variable in os.environ for variable in _KEY_VARIABLES) or not importlib.util.find_spec("boto3"):
        return {}
    import boto3  # noqa: PLC0415 -- an extra, and slow to import
    from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415 -- as above

    session = boto3.Session()
    if session.get_credentials() is None:
        raise AccessError(
            13,
            "there are no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or for a "
            "public bucket AWS_SKIP_SIGNATURE=true",
            url,
        )
    return {"credential_provider": Boto3CredentialProvider(session)}


T = TypeVar("T")

# Seconds between two attempts: the first pause and the longest.
_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# Text of a refusal where the client has no class for it, as in listings.
_FORBIDDEN = re.compile(r"AccessDenied|\b(401 Unauthorized|403 Forbidden)\b")
# Text of the answer if an object ends before the requested range.
_BEYOND = re.compile(r"InvalidRange|\b416 R")


class ShortError(Exception):
    """An answer with fewer bytes than were requested."""


def short_answer(came: int, asked: int) -> ShortError:
    """The error for an answer of `came` bytes instead of `asked`."""
    return ShortError(f"{came} bytes came, {asked} were asked for")


def try_again(where: str, work: Callable[[], T], short: Callable[[], None], refusals: ModuleType, patience: float) -> T:
    """The result of `work`, retried while it fails with a transient error; blocks until then.

    Args:
        where: the object, for errors.
        work: makes one or several requests.
        short: called after an answer that was too short: raises if the object itself is too short.
        refusals: the module of the client's errors.
        patience: seconds for which it is retried.

    Raises:
        StoreNotFoundError: there is no such object, or bucket.
        AccessError: the server refuses access.
        RemoteError: no complete answer in that time.
    """
    began, pause = time.monotonic(), _PAUSE
    while True:
        try:
            return work()
        except (ShortError, FileNotFoundError, RemoteError, refusals.BaseError) as error:
            failure: Exception = error
        # After the `except`, so that the client's error, which may contain a password, is not the context of ours.
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
    """Raise our error if `error` is permanent, so that a retry cannot help."""
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
