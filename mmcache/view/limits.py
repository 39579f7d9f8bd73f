"""What a connection gets, whose other end may be any program on this machine: little time, and little memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from mmcache.view.gate import KNOWN

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

__all__ = ["LimitedConnection"]


class LimitedConnection(H11Protocol):
    """One HTTP connection, which is cut when its other end is slow; and the oldest one, when there are too many.

    Those that wait for a request and those that are answered are counted apart, so that half requests, of which anybody
    can send many, end no answer. What a request may send, beside its headers, is `Gate`'s to say. Computing an answer
    may take any time.
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
