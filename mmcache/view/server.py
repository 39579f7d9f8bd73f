"""The page's HTTP server: a store in the browser, served on the loopback address to those who have the secret.

The data of each panel is at `/<panel>.json`, as the view of that name returns it. The only file written is the one that
opens the browser. The only files read are the store's, the page's own, and those given at the start.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast
from urllib.parse import parse_qsl

import anyio
import numpy as np
import uvicorn
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmcache.errors import ArgumentError, MmcacheError
from mmcache.text import json_ready
from mmcache.view.access import KNOWN, Access, TokenAuth
from mmcache.view.figures import plotly_js
from mmcache.view.open_browser import open_browser as open_in_browser
from mmcache.view.panels import DRAWING, PANELS, Source, parse

if TYPE_CHECKING:
    import asyncio
    import os
    from collections.abc import Callable, Iterator, Mapping

    from starlette.requests import Request
    from starlette.types import ASGIApp

    from mmcache.view.base import View

__all__ = ["LimitedConnection", "Page", "serve"]


class LimitedConnection(H11Protocol):
    """One HTTP connection. It is closed if the client is slow; if there are too many, the oldest one is closed.

    Waiting connections and those being answered are counted separately, so that incomplete requests, which any program
    can send, never end an answer. `TokenAuth` decides what a request may send besides headers. Computing an answer may
    take any time.
    """

    # Seconds from the connection, or the last answer, until the request must be complete.
    patience: ClassVar[float] = 5.0
    # Seconds within which the client must read some of an answer.
    stalled: ClassVar[float] = 20.0
    # The largest number of connections without the secret: waiting, and being answered, each.
    most: ClassVar[int] = 64

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._known = self._cut = False
        self._since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        super().connection_made(transport)
        self._cut_after(self.patience)
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the deadline."""
        super().connection_lost(exc)
        self._stop_waiting()

    def handle_events(self) -> None:
        """Cancel the deadline once a request is complete."""
        answering = self.is_answering()
        super().handle_events()
        # Data that arrives during an answer is no sign that the answer is being read.
        if self.is_answering() and not answering:
            self._stop_waiting()
            self._since = self.loop.time()
            self._make_room()

    def on_response_complete(self) -> None:
        """Start the deadline of the next request."""
        self._known = self._known or self._has_secret()
        # Before `super()`, which may begin the next request.
        self._since = self.loop.time()
        self._cut_after(self.patience)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the deadline for the client to read."""
        super().pause_writing()
        self._cut_after(self.stalled)

    def resume_writing(self) -> None:
        """The client has read: cancel that deadline."""
        super().resume_writing()
        if self.is_answering():
            self._stop_waiting()
        else:
            self._cut_after(self.patience)

    def is_answering(self) -> bool:
        """Whether a request has arrived and is not fully answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def is_strange(self) -> bool:
        """Whether no request on this connection had the secret."""
        return not (self._cut or self._known or self._has_secret())

    def cut(self) -> None:
        """Close the connection at once; unsent data is lost."""
        self._cut = True
        self.transport.abort()

    def _make_room(self) -> None:
        alike = [one for one in self.connections if isinstance(one, LimitedConnection) and one.is_strange()]
        alike = [one for one in alike if one.is_answering() is self.is_answering()]
        if len(alike) > self.most:
            min(alike, key=lambda one: one._since).cut()  # noqa: SLF001 -- of this class

    def _has_secret(self) -> bool:
        return self.scope is not None and KNOWN in cast("Mapping[str, Any]", self.scope)

    def _cut_after(self, seconds: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(seconds, self.cut)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


_ADDRESS = "127.0.0.1"
_STATIC = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# How many connections may wait to be accepted.
_BACKLOG = 64
# How many views are computed at a time.
_AT_ONCE = 2
# gzip's level: higher ones take much longer for a few percent.
_LEVEL = 6


class _Server(uvicorn.Server):
    """Leaves signals to its caller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Page:
    """A page about a store, and its address; `run` serves it.

    Args:
        source: the store, and what was given with it.
        port: the port to serve on; 0 for any free one.

    Attributes:
        port: the port in use.
        root: the page's address, without a token.
        access: checks tokens and the secret.

    Raises:
        ArgumentError: the port is in use, or not permitted.
    """

    def __init__(self, source: Source, *, port: int = 0) -> None:
        self.source = source
        self._socket = _listening(port)
        self.port: int = self._socket.getsockname()[1]
        self.root = f"http://{_ADDRESS}:{self.port}/"
        self.access = Access()
        self._room = anyio.CapacityLimiter(_AT_ONCE)
        app: ASGIApp = Starlette(
            routes=[
                Route("/", functools.partial(_file, name="index.html")),
                Route("/page.json", self._facts),
                Route("/plotly.js", self._plotly),
                Route("/{panel}.json", self._panel),
                Route("/{name}", _file),
            ],
            exception_handlers={MmcacheError: _refused, Exception: _failed},
        )
        app = GZipMiddleware(app, minimum_size=500, compresslevel=_LEVEL)
        open_paths = {"/", "/plotly.js", *(f"/{name}" for name in _files())}
        gate = TokenAuth(app, port=self.port, access=self.access, open_paths=open_paths)
        # Clients' errors are not shown in the terminal, only our own.
        config = uvicorn.Config(
            gate, http=LimitedConnection, ws="none", lifespan="off", backlog=_BACKLOG, log_level="error",
            access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = _Server(config)

    def one_time_url(self, used: Callable[[], object] = lambda: None) -> str:
        """An address that opens the page once; `used` is called when it has done so.

        The token follows the `#`. Browsers do not send that part to any server; the page's script reads it.
        """
        return f"{self.root}#token={self.access.one_time_token(used)}"

    def run(self) -> None:
        """Serve until `stop` is called."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Make `run` return. Thread-safe."""
        self._server.should_exit = True

    async def _facts(self, _request: Request) -> Response:
        facts = await run_sync(self.source.facts, limiter=self._room)
        version, _, _ = await run_sync(_packed_plotly)
        return _json(facts | {"plotly": f"plotly.js?version={version}"})

    async def _panel(self, request: Request) -> Response:
        panel = PANELS.get(request.path_params["panel"])
        if panel is None:
            return _json({"error": f"no such panel: there are {', '.join(PANELS)}"}, 404)
        given = parse_qsl(request.url.query, keep_blank_values=True)
        asked = parse(given, {**panel.parameters, **DRAWING})
        work = functools.partial(_drawn, lambda: panel.make(self.source, asked), asked)
        body = await run_sync(work, limiter=self._room, abandon_on_cancel=True)
        return Response(body, media_type="application/json")

    @staticmethod
    async def _plotly(request: Request) -> Response:
        _, plain, packed = await run_sync(_packed_plotly)
        # Cached forever: the address changes with the version.
        headers = {"Cache-Control": "private, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(packed, media_type="text/javascript", headers=headers | {"Content-Encoding": "gzip"})
        # Set explicitly, so that the middleware does not compress it again.
        return Response(plain, media_type="text/javascript", headers=headers | {"Content-Encoding": "identity"})


def _listening(port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise ArgumentError(f"port is {port}: expected 0 to 65535")
    listener = socket.socket()
    # So that the next page can use the port of one that just ended.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_ADDRESS, port))
        # From now on, connections queue until they are served.
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ArgumentError(f"port {port} cannot be used ({error.strerror}): name another, or none") from error
    return listener


@functools.cache
def _packed_plotly() -> tuple[str, bytes, bytes]:
    version, plain = plotly_js()
    return version, plain, gzip.compress(plain, _LEVEL, mtime=0)


@functools.cache
def _files() -> dict[str, tuple[bytes, str]]:
    """The page's own files; no others can be requested."""
    return {file.name: (file.read_bytes(), _TYPES[file.suffix]) for file in _STATIC.iterdir() if file.suffix in _TYPES}


async def _file(request: Request, name: str | None = None) -> Response:
    found = _files().get(name or request.path_params["name"])
    if found is None:
        return PlainTextResponse("there is no such file\n", 404)
    return Response(found[0], media_type=found[1])


def _drawn(make: Callable[[], View], asked: dict[str, Any]) -> bytes:
    """Compute a view, and write it as JSON, with what else was requested."""
    view = make()
    shown = view
    if asked["brief"]:
        tables = {name for name, value in view.data.items() if isinstance(value, np.ndarray) and value.ndim > 1}
        shown = replace(view, data={name: value for name, value in view.data.items() if name not in tables})
    ready = shown.to_json()
    if asked["figure"]:
        ready["figure"] = json.loads(view.figure(dark=asked["dark"]).to_json())
    return json.dumps(ready, allow_nan=False, separators=(",", ":")).encode()


def _json(ready: dict[str, Any], status: int = 200) -> Response:
    return JSONResponse(json_ready(ready), status)


async def _refused(_request: Request, error: Exception) -> Response:
    return _json({"error": str(error)}, 400)


async def _failed(_request: Request, _error: Exception) -> Response:
    # The server's log has the traceback; the client gets none of it.
    return _json({"error": "this failed inside mmcache: the terminal says how"}, 500)


def serve(
    path: str | os.PathLike[str],
    *,
    tidy: contextlib.ExitStack,
    port: int = 0,
    open_browser: bool = True,
    direction: str | os.PathLike[str] | None = None,
    unembedding: str | None = None,
    trust_remote_code: bool = False,
    announce: Callable[[str, str], object],
    tell: Callable[[str], object],
) -> None:
    """Serve the page about a store, until the process ends.

    Args:
        path: the store's folder, or its address in a bucket; shards may be missing.
        tidy: removes temporary files at exit.
        port: the port to serve on; 0 for any free one.
        open_browser: whether to open the page in the browser.
        direction: a file that `load_direction` reads, for the panels that take a direction.
        unembedding: the name of the model whose head the lens uses.
        trust_remote_code: run Python code from the model's folder.
        announce: called with an address that opens the page once, and the secret, for scripts; called again with a new
            address whenever one was used.
        tell: called with messages for the terminal.

    Raises:
        MmcacheError: the store, the direction or the model cannot be read.
        ArgumentError: the port is in use.
    """
    source = Source(path, direction, unembedding, trust_remote_code=trust_remote_code)
    page = Page(source, port=port)

    def invite() -> None:
        # The terminal may be closed, while the page is still in use.
        with contextlib.suppress(OSError):
            announce(page.one_time_url(invite), page.access.secret)

    invite()
    tell("Press Ctrl-C to end.")
    # Compress plotly.js in the background, so that the first figure need not wait for it.
    threading.Thread(target=_packed_plotly, daemon=True).start()
    if open_browser:
        open_in_browser(page.one_time_url, tidy, tell)
    page.run()
