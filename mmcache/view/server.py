"""The page: a store, looked at in the browser. Served on the loopback address alone, to who has the secret.

Every panel's data is at `/<panel>.json`, as the view of that name gives it. Nothing is written but the file that opens
the browser, and no file but the store's, and those given at the start, is read.
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
    """One HTTP connection, which is cut when its other end is slow; and the oldest one, when there are too many.

    Those that wait for a request and those that are answered are counted apart, so that half requests, of which anybody
    can send many, end no answer. What a request may send, beside its headers, is `TokenAuth`'s to say. Computing an
    answer may take any time.
    """

    # Seconds in which a request must be there, from the connection or the last answer on.
    patience: ClassVar[float] = 5.0
    # Seconds in which some of an answer must be read.
    stalled: ClassVar[float] = 20.0
    # Connections on which no request had the secret: so many that wait, and so many that are answered.
    most: ClassVar[int] = 64

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._known = self._cut = False
        self._since = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._cut_after(self.patience)
        self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        super().connection_lost(exc)
        self._stop_waiting()

    def handle_events(self) -> None:
        """Wait no longer when a request is there."""
        answering = self.is_answering()
        super().handle_events()
        # What comes while it is answered is no sign that the answer is read.
        if self.is_answering() and not answering:
            self._stop_waiting()
            self._since = self.loop.time()
            self._make_room()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._known = self._known or self._has_secret()
        # Before what is there already is looked at.
        self._since = self.loop.time()
        self._cut_after(self.patience)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait for the other end to read."""
        super().pause_writing()
        self._cut_after(self.stalled)

    def resume_writing(self) -> None:
        """Wait no longer for that: it has read."""
        super().resume_writing()
        if self.is_answering():
            self._stop_waiting()
        else:
            self._cut_after(self.patience)

    def is_answering(self) -> bool:
        """Whether a request is there that has no whole answer yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def is_strange(self) -> bool:
        """Whether no request on it had the secret."""
        return not (self._cut or self._known or self._has_secret())

    def cut(self) -> None:
        """End it at once, whatever is unsent."""
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
# Connections that wait to be taken on, all of which may be at once.
_BACKLOG = 64
# Views that are computed at once.
_AT_ONCE = 2
# Of gzip: higher ones take much longer for a few percent.
_LEVEL = 6


class _Server(uvicorn.Server):
    """Leaves signals to who runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Page:
    """A page about a store, and its address; `run` serves it.

    Args:
        source: the store, and what was given with it.
        port: to serve on; 0 for one that is free.

    Attributes:
        port: the one that was taken.
        root: the address of the page, for who has the secret.
        access: who has it.

    Raises:
        ArgumentError: the port is taken, or may not be used.
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
        # What others send is no news for the terminal: errors are only those of ours.
        config = uvicorn.Config(
            gate, http=LimitedConnection, ws="none", lifespan="off", backlog=_BACKLOG, log_level="error",
            access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = _Server(config)

    def one_time_url(self, used: Callable[[], object] = lambda: None) -> str:
        """An address that opens the page once; `used` is called when it has done so.

        The token in it is behind the `#`, which browsers send to nobody: the page's script takes it from there.
        """
        return f"{self.root}#token={self.access.one_time_token(used)}"

    def run(self) -> None:
        """Serve until `stop` is called."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Let `run` come to its end. May be called from any thread."""
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
        # Its address changes with its version.
        headers = {"Cache-Control": "private, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(packed, media_type="text/javascript", headers=headers | {"Content-Encoding": "gzip"})
        # Said, so that it is not packed again.
        return Response(plain, media_type="text/javascript", headers=headers | {"Content-Encoding": "identity"})


def _listening(port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise ArgumentError(f"port is {port}: expected 0 to 65535")
    listener = socket.socket()
    # So that a page that just ended leaves its port to the next one.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_ADDRESS, port))
        # From now on requests wait until they are served.
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
    """Read the files of the page: what is not among them cannot be asked for."""
    return {file.name: (file.read_bytes(), _TYPES[file.suffix]) for file in _STATIC.iterdir() if file.suffix in _TYPES}


async def _file(request: Request, name: str | None = None) -> Response:
    found = _files().get(name or request.path_params["name"])
    if found is None:
        return PlainTextResponse("there is no such file\n", 404)
    return Response(found[0], media_type=found[1])


def _drawn(make: Callable[[], View], asked: dict[str, Any]) -> bytes:
    """Compute a view, and write it as JSON with what was asked for."""
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
    # The server's log has the traceback; who asks gets none of it.
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
        tidy: gets what is to be removed then.
        port: 0 for one that is free.
        open_browser: open the page in it.
        direction: a file that `load_direction` reads, for the panels that take one.
        unembedding: the name of the model whose head the lens uses.
        trust_remote_code: run the Python code that the model's folder brings along.
        announce: is called with an address that opens the page once, and the secret, for scripts; and again with
            another address when that one was used.
        tell: is called with sentences for who reads the terminal.

    Raises:
        MmcacheError: the store, the direction or the model cannot be read.
        ArgumentError: the port is taken.
    """
    source = Source(path, direction, unembedding, trust_remote_code=trust_remote_code)
    page = Page(source, port=port)

    def invite() -> None:
        # Whoever read the terminal may have gone, which is no matter for those who look at the page.
        with contextlib.suppress(OSError):
            announce(page.one_time_url(invite), page.access.secret)

    invite()
    tell("Press Ctrl-C to end.")
    # Figures take a while to get ready, and the first one need not wait for that.
    threading.Thread(target=_packed_plotly, daemon=True).start()
    if open_browser:
        open_in_browser(page.one_time_url, tidy, tell)
    page.run()
