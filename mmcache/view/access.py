"""Which requests reach the page: those that have the secret, and those for its own files, made by no other web page.

Addresses get around: into the history, the arguments of a browser, what others see of a screen. So what an address
holds is worth nothing after its first use. The secret is in no address and in no cookie, which a browser would send to
every port of this machine: who asks for data sends it as `Authorization: Bearer`.

Which requests reach the page: those that have the secret, and those for its own files, made by no other web page. The
page is on the loopback address, which every program and every web page on this machine can reach. Asked for are our own
name as `Host` (else a name that was pointed at 127.0.0.1 would be us), no sign of another origin, no body, and the
secret. Without it there are only the page's own files, which are the same for everybody and have nothing of the store;
among them is the script that keeps the secret and sends it.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["KNOWN", "SESSION", "Access", "TokenAuth"]

# Where a token is exchanged for the secret.
SESSION = "/session"
# Said in the scope of a request that has the secret.
KNOWN = "mmcache.known"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_REFUSED = "refused: open an address that `mmcache view` printed; each is good once, then the next one is printed\n"
# Bytes of an answer that are written at once, so that one that is not read takes no more memory.
_PIECE = 1 << 16


class TokenAuth:
    """An ASGI app in front of another, which sees only what may come in; every answer gets the safe headers.

    Args:
        app: what is behind.
        port: ours.
        access: who may see the store.
        open_paths: of the page's own files, which need no secret; `"/"` is the page.
    """

    def __init__(self, app: ASGIApp, *, port: int, access: Access, open_paths: Container[str]) -> None:
        self._app, self._access, self._open_paths = app, access, open_paths
        # Browsers leave the port out of `Host` where it is that of http.
        ends = (f":{port}", "") if port == 80 else (f":{port}",)
        self._hosts = {f"{name}{end}" for name in ("127.0.0.1", "localhost", "[::1]") for end in ends}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it through; what is not http is left without an answer."""
        if scope["type"] != "http":
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
                if message["status"] >= 400:
                    # Whatever else comes on this connection is not read.
                    headers["Connection"] = "close"
            body = message.get("body", b"")
            last = max(0, len(body) - 1) // _PIECE * _PIECE
            for start in range(0, last, _PIECE):
                await send({**message, "body": body[start : start + _PIECE], "more_body": True})
            await send({**message, "body": body[last:]} if last else message)

        answer = self._answer(scope)
        await (answer or self._app)(scope, receive, send_safely)

    def _answer(self, scope: Scope) -> Response | None:
        """The answer to a request that must not come in, or asks for the secret; None lets it through."""
        headers, path = Headers(scope=scope), scope["path"]
        if "transfer-encoding" in headers or int(headers.get("content-length", 0)):
            return PlainTextResponse("this page takes no body\n", 413)
        opened = headers.get("sec-fetch-mode") == "navigate"
        if not self._from_here(headers, opened):
            return PlainTextResponse(_REFUSED, 403)
        allowed = ("POST",) if path == SESSION else ("GET", "HEAD")
        if scope["method"] not in allowed:
            return PlainTextResponse("this page only shows\n", 405, {"Allow": ", ".join(allowed)})
        authorization = headers.getlist("authorization")
        if path == SESSION:
            secret = self._access.exchange(authorization)
            return PlainTextResponse(_REFUSED, 403) if secret is None else JSONResponse({"secret": secret})
        if self._access.admits(authorization):
            scope[KNOWN] = True
        elif opened and path.endswith(".json"):
            # Data in a tab of their own: the page asks for them with the secret, which a browser does not send itself.
            scope["path"] = "/"
        elif path not in self._open_paths:
            return PlainTextResponse(_REFUSED, 403)
        return None

    def _from_here(self, headers: Headers, opened: bool) -> bool:
        """Whether a request is addressed to us by our own name, and made by no other site, but for opening the page."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return False
        if any(origin != f"http://{hosts[0].lower()}" for origin in headers.getlist("origin")):
            return False
        return opened or headers.get("sec-fetch-site", "none") in {"same-origin", "none"}


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
