"""Addresses of object storage, and removal of credentials from them and from other texts.

Credentials come from the environment; an address needs none. A user name, a password or a signature in an address is
removed before anything else sees it, and from the messages of clients and servers before they are shown.
"""

from __future__ import annotations

import os
import re

__all__ = ["SCHEMES", "address", "concealed", "is_url", "redacted"]

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "file")
# Schemes where the part before the @ names a container.
_CONTAINERS = ("abfs", "abfss")
_HIDDEN = "***"
# Paths keep only one of the two slashes. A secret key may contain slashes; a user name without a password may be a
# token.
_CREDENTIALS = re.compile(r"\b([a-z][a-z0-9+.-]*:/{1,2})([^\s/?#@'\"<>:]*(?::[^\s'\"<>]*)?)@", re.IGNORECASE)
_QUERY = re.compile(
    r"\b([a-z][a-z0-9+.-]*:/{1,2}[^\s?'\"<>]+)\?[^\s'\"<>]*?(?=[]).,;:]*(?:[\s'\"<>]|$))", re.IGNORECASE
)
_PARAMETER = re.compile(
    r"\b((?:X-(?:Amz|Goog)-)?(?:Signature|Credential|Security-Token)|sig|AWSAccessKeyId)=[^\s&'\"<>]+", re.IGNORECASE
)
# Names of environment variables that hold a secret, and the shortest value that counts as one.
_SECRET = re.compile(r"^(AWS|AZURE|GOOGLE)_\w*(SECRET|TOKEN|KEY|PASSWORD|SAS)(?!\w*_(ID|FILE|URI|URL|PATH)$)")
_LEAST = 8


def is_url(path: object) -> bool:
    """Whether a store's place is an address of object storage, such as `s3://bucket/acts`."""
    return isinstance(path, str) and path.partition("://")[0] in SCHEMES and "://" in path


def address(url: str) -> str:
    """An address without user name, password, query and fragment, which do not say where a store is."""
    scheme, _, rest = url.partition("://")
    rest = re.split("[?#]", rest, maxsplit=1)[0]
    first = rest.partition("/")[0]
    if "@" in first or (":" in first and "@" in rest):
        # A secret may contain slashes; a bucket's name has no colon.
        end = (first if "@" in first else rest).rindex("@")
        before, rest = rest[:end], rest[end + 1 :]
        if scheme in _CONTAINERS:
            rest = f"{before.partition(':')[0]}@{rest}"
    return f"{scheme}://{rest}"


def redacted(text: str) -> str:
    """A text without passwords, signatures, keys, and secrets from the environment."""
    for secret in _environment():
        text = text.replace(secret, _HIDDEN)
    if ":/" in text:
        text = _QUERY.sub(r"\1", _CREDENTIALS.sub(_without_credentials, text))
    return _PARAMETER.sub(rf"\1={_HIDDEN}", text) if "=" in text else text


def _without_credentials(found: re.Match[str]) -> str:
    container, colon, _ = found[2].partition(":")
    if found[1].partition(":")[0].lower() in _CONTAINERS:
        return f"{found[1]}{container}{colon and ':' + _HIDDEN}@"
    return f"{found[1]}{_HIDDEN}@"


def _environment() -> list[str]:
    return [value for name, value in os.environ.items() if len(value) >= _LEAST and _SECRET.search(name)]


def concealed(error: BaseException) -> BaseException:
    """An error to name as the cause of another; if it or its causes contain a secret, a copy of its text without it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if all(redacted(text := str(one)) == text for one in chain):
        return error
    return RuntimeError(f"{type(error).__name__}: {redacted(str(error))}")
