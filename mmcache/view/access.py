"""Who may see the store: a token that is good once, in an address, is exchanged for the secret of the running page.

Addresses get around: into the history, the arguments of a browser, what others see of a screen. So what an address
holds is worth nothing after its first use. The secret is in no address and in no cookie, which a browser would send to
every port of this machine: who asks for data sends it as `Authorization: Bearer`.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Access"]

_BYTES = 32


class Access:
    """The secret of one running page, and the tokens that are good once.

    Attributes:
        secret: what requests for data must have.
    """

    def __init__(self) -> None:
        self.secret = secrets.token_urlsafe(_BYTES)
        self._tokens: dict[str, Callable[[], object]] = {}

    def one_time_token(self, used: Callable[[], object]) -> str:
        """A new token, good until it is exchanged; `used` is called then."""
        token = secrets.token_urlsafe(_BYTES)
        self._tokens[token] = used
        return token

    def exchange(self, authorization: list[str]) -> str | None:
        """The secret for the `Authorization` of a request, whose token is then used up; None if it has none that is."""
        known = [token for token in self._tokens if _is(authorization, token)]
        for token in known:
            self._tokens.pop(token)()
        return self.secret if known else None

    def admits(self, authorization: list[str]) -> bool:
        """Whether a request with this `Authorization` has the secret."""
        return _is(authorization, self.secret)


def _is(authorization: list[str], token: str) -> bool:
    # As bytes: texts that are not ASCII cannot be compared in constant time.
    return len(authorization) == 1 and secrets.compare_digest(authorization[0].encode(), f"Bearer {token}".encode())
