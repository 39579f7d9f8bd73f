"""Who may ask the page: this machine's user, who has the token, and nobody's web page.

The page is on the loopback address, which every program and every web page on this machine can reach. Asked for are
the token (in the address, or in a cookie that other sites' requests do not carry), our own name as `Host` (else a
name that was pointed at 127.0.0.1 would be us), and no sign of another origin.
"""

from __future__ import annotations

import secrets
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Gate"]

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
_REFUSED = "refused: open the address that `mmcache view` printed\n"


class Gate:
    """An ASGI app in front of another, which sees only what may come in; every answer gets the safe headers.

    Args:
        app: what is behind.
        port: ours.
        token: what is asked for.
    """

    def __init__(self, app: ASGIApp, *, port: int, token: str) -> None:
        self._app, self._token = app, token
        self._cookie = f"mmcache-{port}"
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
            await send(message)

        answer = self._stopped(scope)
        await (answer or self._app)(scope, receive, send_safely)

    def _stopped(self, scope: Scope) -> Response | None:
        """Give the answer to a request that must not come in, or comes with the token for the first time."""
        headers = Headers(scope=scope)
        given = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in given if name == "token"]
        if not self._from_here(scope, headers, bool(tokens)) or not self._known(headers, tokens):
            return PlainTextResponse(_REFUSED, 403)
        if scope["method"] not in {"GET", "HEAD"}:
            return PlainTextResponse("this page only shows\n", 405, {"Allow": "GET, HEAD"})
        if tokens and scope["path"] == "/":
            rest = urlencode([(name, value) for name, value in given if name != "token"])
            return self._welcome(f"/?{rest}" if rest else "/", headers)
        return None

    def _from_here(self, scope: Scope, headers: Headers, tokened: bool) -> bool:
        """Tell whether a request is addressed to us by our own name, and made by no other site."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return False
        if any(origin != f"http://{hosts[0].lower()}" for origin in headers.getlist("origin")):
            return False
        if headers.get("sec-fetch-site", "none") in {"same-origin", "none"}:
            return True
        # A link to us on another page, which a person followed: a terminal in the browser, a notebook.
        return tokened and scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"

    def _known(self, headers: Headers, tokens: list[str]) -> bool:
        cookies = cookie_parser(headers.get("cookie", ""))
        offered = [*tokens, *filter(None, [cookies.get(self._cookie)])]
        # As bytes: texts that are not ASCII cannot be compared in constant time.
        return any(secrets.compare_digest(one.encode(), self._token.encode()) for one in offered)

    def _welcome(self, address: str, headers: Headers) -> Response:
        """Keep the token in a cookie, and take it out of the address."""
        answer: Response
        if headers.get("sec-fetch-site", "none") in {"same-origin", "none"}:
            answer = RedirectResponse(address, 303)
        else:
            # Along a redirect that another site began, browsers keep strict cookies back; from a page of ours, not.
            answer = HTMLResponse(
                f'<!doctype html><title>mmcache</title><meta http-equiv="refresh" content="0; url={escape(address)}">'
            )
        answer.set_cookie(self._cookie, self._token, httponly=True, samesite="strict", path="/")
        return answer
