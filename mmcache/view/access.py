"""Access control of the page: only requests with the secret get data, and none made by another website.

Addresses leak: into the browser's history, its command line, a shared screen. So the token in an address is valid only
once. The secret is in no address and in no cookie, which a browser would send to every port of this machine. A request
sends it as `Authorization: Bearer`.

The page listens on the loopback address, which every program and website on this machine can reach. A request must
have our own name as `Host` (otherwise a website could point its name at 127.0.0.1: DNS rebinding), no other origin, no
body, and the secret. Without the secret it gets only the page's own files. They are the same for everybody and hold
nothing of the store; among them is the script that keeps the secret and sends it.
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

# Where a one-time token is exchanged for the secret.
SESSION = "/session"
# Set in the scope of a request that has the secret.
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
# An answer is sent in pieces of this many bytes, so that one that is not read takes little memory.
_PIECE = 1 << 16


class TokenAuth:
    """An ASGI app that passes only permitted requests to another, and adds security headers to every response.

    Args:
        app: the app behind it.
        port: the port of the page.
        access: checks tokens and the secret.
        open_paths: paths of the page's own files, which need no secret; `"/"` is the page.
    """

    def __init__(self, app: ASGIApp, *, port: int, access: Access, open_paths: Container[str]) -> None:
        self._app, self._access, self._open_paths = app, access, open_paths
        # For port 80, browsers leave the port out of `Host`.
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
                    # The rest of what comes on this connection is not read.
                    headers["Connection"] = "close"
            body = message.get("body", b"")
            last = max(0, len(body) - 1) // _PIECE * _PIECE
            for start in range(0, last, _PIECE):
                await send({**message, "body": body[start : start + _PIECE], "more_body": True})
            await send({**message, "body": body[last:]} if last else message)

        answer = self._answer(scope)
        await (answer or self._app)(scope, receive, send_safely)

    def _answer(self, scope: Scope) -> Response | None:
        """The response to a request that is refused or asks for the secret; None to pass it on."""
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
            # Data opened in a tab: the browser itself does not send the secret, so the page is sent, and requests the
            # data.
            scope["path"] = "/"
        elif path not in self._open_paths:
            return PlainTextResponse(_REFUSED, 403)
        return None

    def _from_here(self, headers: Headers, opened: bool) -> bool:
        """Whether `Host` is our own name, and no other site made the request unless it opens the page."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return False
        if any(origin != f"http://{hosts[0].lower()}" for origin in headers.getlist("origin")):
            return False
        return opened or headers.get("sec-fetch-site", "none") in {"same-origin", "none"}


_BYTES = 32


class Access:
    """The secret of one running page, and its one-time tokens.

    Attributes:
        secret: what requests for data must send.
    """

    def __init__(self) -> None:
        self.secret = secrets.token_urlsafe(_BYTES)
        self._tokens: dict[str, Callable[[], object]] = {}

    def one_time_token(self, used: Callable[[], object]) -> str:
        """A new token, valid until it is exchanged; then `used` is called."""
        token = secrets.token_urlsafe(_BYTES)
        self._tokens[token] = used
        return token

    def exchange(self, authorization: list[str]) -> str | None:
        """The secret, if the `Authorization` holds a valid token, which is used up; else None."""
        known = [token for token in self._tokens if _is(authorization, token)]
        for token in known:
            self._tokens.pop(token)()
        return self.secret if known else None

    def admits(self, authorization: list[str]) -> bool:
        """Whether a request with this `Authorization` has the secret."""
        return _is(authorization, self.secret)


def _is(authorization: list[str], token: str) -> bool:
    # Compared as bytes: `compare_digest` takes no non-ASCII text.
    return len(authorization) == 1 and secrets.compare_digest(authorization[0].encode(), f"Bearer {token}".encode())
