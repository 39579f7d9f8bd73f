"""Connections to object storage: which client, with which credentials, and how patient it is.

S3 and what speaks its language, Google Cloud Storage, Azure and `file://`, through obstore.
"""

from __future__ import annotations

import importlib.util
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mmcache.errors import AccessError, ArgumentError
from mmcache.urls import SCHEMES, address, concealed, is_url

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["client_library", "connect", "placed", "said"]

# Seconds that a server may take to be reached, to send anything more of an answer, and all of it.
_CONNECT, _SILENCE, _REQUEST = 10, 30, 600
# Times that the client itself tries again, and the longest pause between two: the caller, who can be told to stop,
# tries again behind it.
_TIMES, _PAUSE = 4, 1
_KEY_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
                  "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE")  # fmt: skip


def placed(path: str | os.PathLike[str]) -> str | Path:
    """A store's place: an address of object storage, without what is secret in it, or else a folder.

    Raises:
        ArgumentError: an address of another kind, such as `https://…`.
    """
    if is_url(path):
        return address(str(path))
    if "://" in str(path):
        raise ArgumentError(
            f"{str(path)!r}: expected a folder, or an address such as s3://bucket/acts ({', '.join(SCHEMES)})"
        )
    return Path(path)


def said(error: Exception) -> str:
    """Give what an error says, without the client's account of how it came to it."""
    return " ".join(str(error).partition("\n\nDebug source")[0].split())[:400]


def client_library() -> ModuleType:
    """Give obstore. Raises ArgumentError where it is not installed."""
    try:
        import obstore  # noqa: PLC0415 -- an extra
        import obstore.exceptions  # noqa: PLC0415 -- as above
        import obstore.store  # noqa: PLC0415 -- as above
    except ImportError as error:
        raise ArgumentError("object storage needs obstore: pip install 'mmcache[remote]'") from error
    return obstore


def connect(url: str, obstore: ModuleType, patience: float) -> Any:
    """Make the client of a prefix; asks nothing of the server yet.

    Args:
        url: the prefix.
        obstore: what makes it.
        patience: seconds for which the caller tries again; the client itself tries for half of them.

    Raises:
        ArgumentError: no such address.
        AccessError: there are no credentials.
    """
    if url.startswith("file://"):
        return _made(url, obstore, {})
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=_CONNECT),
        "read_timeout": timedelta(seconds=_SILENCE),
        # Of a whole request: a large part over a slow line.
        "timeout": timedelta(seconds=_REQUEST),
    }
    options: dict[str, Any] = {
        "client_options": client,
        "retry_config": {
            "max_retries": _TIMES,
            "retry_timeout": timedelta(seconds=patience / 2),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=_PAUSE), "base": 2},
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
    """Refuse what the client would end the process' thread for."""
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
    """Give the options of S3 that the client does not find by itself."""
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
