"""Addresses of object storage, and texts that may hold one: what is secret in them is never shown.

Credentials come from the environment, and an address needs none: a user name, a password or a signature in one is taken
off before anything else sees it. What others say (a client, a server) is shown without such parts.
"""

from __future__ import annotations

import os
import re

__all__ = ["SCHEMES", "address", "concealed", "is_url", "redacted"]

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "file")
# Where what stands before the @ is the name of a container.
_CONTAINERS = ("abfs", "abfss")
_HIDDEN = "***"
# A path has one slash of the two. A secret key may have slashes too; a user name without a password may be a token.
_CREDENTIALS = re.compile(r"\b([a-z][a-z0-9+.-]*:/{1,2})([^\s/?#@'\"<>:]*(?::[^\s'\"<>]*)?)@", re.IGNORECASE)
_QUERY = re.compile(
    r"\b([a-z][a-z0-9+.-]*:/{1,2}[^\s?'\"<>]+)\?[^\s'\"<>]*?(?=[]).,;:]*(?:[\s'\"<>]|$))", re.IGNORECASE
)
_PARAMETER = re.compile(
    r"\b((?:X-(?:Amz|Goog)-)?(?:Signature|Credential|Security-Token)|sig|AWSAccessKeyId)=[^\s&'\"<>]+", re.IGNORECASE
)
# Variables of the environment that hold a secret themselves, and how long one is at least.
_SECRET = re.compile(r"^(AWS|AZURE|GOOGLE)_\w*(SECRET|TOKEN|KEY|PASSWORD|SAS)(?!\w*_(ID|FILE|URI|URL|PATH)$)")
_LEAST = 8


def is_url(path: object) -> bool:
    """Whether a store's place is an address of object storage, such as `s3://bucket/acts`."""
    return isinstance(path, str) and path.partition("://")[0] in SCHEMES and "://" in path


def address(url: str) -> str:
    """An address without user name, password, query and fragment, none of which says where a store is."""
    scheme, _, rest = url.partition("://")
    rest = re.split("[?#]", rest, maxsplit=1)[0]
    first = rest.partition("/")[0]
    if "@" in first or (":" in first and "@" in rest):
        # A secret may have slashes, and no bucket has a colon.
        end = (first if "@" in first else rest).rindex("@")
        before, rest = rest[:end], rest[end + 1 :]
        if scheme in _CONTAINERS:
            rest = f"{before.partition(':')[0]}@{rest}"
    return f"{scheme}://{rest}"


def redacted(text: str) -> str:
    """A text without the passwords, signatures and keys that are in it."""
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
    """An error, to be named as the cause of another; if it or its causes say a secret, one that says it without."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if all(redacted(text := str(one)) == text for one in chain):
        return error
    return RuntimeError(f"{type(error).__name__}: {redacted(str(error))}")
