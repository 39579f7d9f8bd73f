"""The panels of the page: each is a view, and a table lists its parameters."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcache.errors import ArgumentError, IncompleteError
from mmcache.read.describe import overview
from mmcache.read.store import open_store
from mmcache.view.base import Sampler, View
from mmcache.view.dimensions import dimension, dimensions, load_direction
from mmcache.view.health import health
from mmcache.view.norms import apart, norms
from mmcache.view.search import find, top
from mmcache.view.tokens import Detokenizer, sequence, token

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from mmcache.view.dimensions import Direction

__all__ = ["DRAWING", "PANELS", "Panel", "Parameter", "Source", "parse"]

# The largest number of tokens that a norm map shows one by one.
_MOST_TOKENS = 240
# Bytes of rows up to which `norms` does so.
_TOKEN_BYTES = 16 << 20
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_FAR = 10**18


class Source:
    """A store, and what was given with it. Thread-safe.

    Args:
        path: the store's folder, or its address in a bucket; shards may be missing.
        direction: a file that `load_direction` reads.
        unembedding: the name of the model whose head the lens uses.
        trust_remote_code: run Python code from the model's folder.

    Raises:
        MmcacheError: one of them cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        direction: str | os.PathLike[str] | None = None,
        unembedding: str | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.store = open_store(path, partial=True)
        self.path = self.store.where
        self.direction = None if direction is None else load_direction(direction)
        self.unembedding: Any = None
        if unembedding is not None:
            from mmcache.view.lens import Unembedding  # noqa: PLC0415 -- loads a model

            self.unembedding = Unembedding.load(unembedding, trust_remote_code=trust_remote_code)
        trusted = ", trust_remote_code=True" if trust_remote_code else ""
        self._given = [
            *([] if direction is None else [f"direction = mmcache.view.load_direction({str(direction)!r})"]),
            *(
                []
                if unembedding is None
                else [f"unembedding = mmcache.view.Unembedding.load({unembedding!r}{trusted})"]
            ),
        ]
        self._words: Detokenizer | None = None
        self._lock = threading.Lock()

    @property
    def words(self) -> Detokenizer:
        """The store's detokenizer, read when first needed."""
        with self._lock:
            if self._words is None:
                self._words = Detokenizer(self.store)
            return self._words

    def site(self, name: str | None) -> str:
        """A site's name; the first site for None. Raises IncompleteError if there is none yet."""
        if name is None and not self.store.sites:
            raise IncompleteError(f"{self.path} has no sites yet")
        return self.store.sites[0] if name is None else name

    def layer(self, number: int | None) -> int:
        """A layer's number; the first layer for None. Raises IncompleteError if there is none yet."""
        if number is None and not self.store.layers:
            raise IncompleteError(f"{self.path} has no layers yet")
        return self.store.layers[0] if number is None else number

    def facts(self) -> dict[str, Any]:
        """What the page needs at its start. Reads no data."""
        return {
            "name": Path(self.path).resolve().name if self.store.url is None else self.path,
            "layers": list(self.store.layers),
            "n_tokens": self.store.n_tokens,
            "n_sequences": self.store.n_sequences,
            "sites": {site: self._site(site) for site in self.store.sites},
            "direction": self.direction is not None,
            "lens": self.unembedding is not None,
            "python": "\n".join(
                ["import mmcache.view", "", f"store = mmcache.open({str(self.path)!r}, partial=True)", *self._given]
            ),
        }

    def _site(self, site: str) -> dict[str, int]:
        width = self.store.d_model(site)
        if width is None or not self.store.layers:
            return {"d_model": 0, "chunk_tokens": 0, "map_tokens": 0}
        look = Sampler(self.store, site)
        # How many tokens a map may show one by one.
        room = min(_MOST_TOKENS, _TOKEN_BYTES // look.record_bytes)
        return {"d_model": width, "chunk_tokens": look.folder.spec.chunk_rows, "map_tokens": room}


@dataclass(frozen=True)
class Parameter:
    """How one parameter is written in an address.

    Attributes:
        kind: `"text"`, `"integer"` or `"flag"` (0 or 1).
        default: the value if it is not given.
        low: the lowest integer.
        high: the highest integer, or the longest text in characters.
        choices: the texts allowed; empty for any.
    """

    kind: str
    default: Any = None
    low: int = -_FAR
    high: int = _FAR
    choices: tuple[str, ...] = ()

    def read(self, name: str, text: str) -> Any:
        """The value that the address gives.

        Raises:
            ArgumentError: it is not valid.
        """
        if self.kind == "text":
            if len(text) > self.high or (self.choices and text not in self.choices):
                what = f"one of {', '.join(self.choices)}" if self.choices else f"at most {self.high} letters"
                raise ArgumentError(f"{name} is {text[:80]!r}: expected {what}")
            return text
        if self.kind == "flag":
            if text not in {"0", "1"}:
                raise ArgumentError(f"{name} is {text[:80]!r}: expected 0 or 1")
            return text == "1"
        if not _INTEGER.fullmatch(text) or not self.low <= int(text) <= self.high:
            raise ArgumentError(f"{name} is {text[:80]!r}: expected a whole number from {self.low} to {self.high}")
        return int(text)


@dataclass(frozen=True)
class Panel:
    """A view that the page can request.

    Attributes:
        make: makes the view from the source and the parameters.
        parameters: by name.
    """

    make: Callable[[Source, dict[str, Any]], View]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


def parse(given: list[tuple[str, str]], wanted: Mapping[str, Parameter]) -> dict[str, Any]:
    """The values of an address's parameters; empty ones count as not given.

    Raises:
        ArgumentError: a parameter is unknown, given twice, or invalid.
    """
    found: dict[str, Any] = {}
    for name, text in given:
        if name not in wanted:
            raise ArgumentError(f"no parameter {name[:80]!r} here: there are {', '.join(wanted)}")
        if name in found:
            raise ArgumentError(f"{name} is given twice")
        if text != "":
            found[name] = wanted[name].read(name, text)
    return {name: parameter.default for name, parameter in wanted.items()} | found


def _overview(source: Source, _asked: dict[str, Any]) -> View:
    return View("overview", source.path, f"mmcache.view.overview({source.path!r})", overview(source.path))


def _health(source: Source, asked: dict[str, Any]) -> View:
    return health(source.store, source.site(asked["site"]))


def _norms(source: Source, asked: dict[str, Any]) -> View:
    start, stop, bins = asked["start"], asked["stop"], asked["bins"]
    # The detokenizer is read only if single tokens may be shown, so that the first view is fast.
    near = (source.store.n_tokens if stop is None else stop) - start <= bins
    words = source.words if near else None
    return norms(source.store, source.site(asked["site"]), start=start, stop=stop, bins=bins, words=words)


def _apart(source: Source, asked: dict[str, Any]) -> View:
    return apart(source.store, source.site(asked["site"]))


def _dimensions(source: Source, asked: dict[str, Any]) -> View:
    return dimensions(source.store, source.site(asked["site"]), most=asked["most"])


def _dimension(source: Source, asked: dict[str, Any]) -> View:
    return dimension(source.store, source.site(asked["site"]), source.layer(asked["layer"]), asked["dimension"])


def _direction(source: Source, number: int | None) -> Direction:
    if number is not None:
        return number
    if source.direction is None:
        raise ArgumentError("no direction was given: ask for a dimension, or start `mmcache view` with --direction")
    return source.direction


def _sequence(source: Source, asked: dict[str, Any]) -> View:
    by, number = asked["by"], asked["dimension"]
    if by == "dimension" and number is None:
        raise ArgumentError("by=dimension needs dimension, its number")
    direction = _direction(source, number if by == "dimension" else None) if by in {"dimension", "direction"} else None
    return sequence(
        source.store, source.site(asked["site"]), source.layer(asked["layer"]), asked["sequence"],
        by=by if direction is None else "value", direction=direction, start=asked["start"], words=source.words,
    )  # fmt: skip


def _token(source: Source, asked: dict[str, Any]) -> View:
    site = source.site(asked["site"])
    return token(source.store, site, asked["position"], context=asked["context"], words=source.words)


def _top(source: Source, asked: dict[str, Any]) -> View:
    return top(
        source.store, source.site(asked["site"]), source.layer(asked["layer"]),
        _direction(source, asked["dimension"]), k=asked["k"], context=asked["context"], words=source.words,
    )  # fmt: skip


def _find(source: Source, asked: dict[str, Any]) -> View:
    return find(
        source.store, asked["text"], token=asked["id"], start=asked["start"], most=asked["most"],
        context=asked["context"], words=source.words,
    )  # fmt: skip


def _lens(source: Source, asked: dict[str, Any]) -> View:
    if source.unembedding is None:
        raise ArgumentError("no unembedding was given: start `mmcache view` with --unembedding")
    from mmcache.view.lens import lens  # noqa: PLC0415 -- loads a model

    site = source.site(asked["site"])
    return lens(source.store, site, asked["position"], source.unembedding, k=asked["k"], words=source.words)


_SITE = {"site": Parameter("text", high=1000)}
_LAYER = _SITE | {"layer": Parameter("integer")}
_DIMENSION = {"dimension": Parameter("integer")}
_POSITION = _SITE | {"position": Parameter("integer", 0)}
_CONTEXT = {"context": Parameter("integer", 12, 0, 200)}
_START = {"start": Parameter("integer", 0, 0)}
_BY = Parameter("text", "norm", choices=("norm", "dimension", "direction", "difference"))
# Further parameters of every panel: add its figure, draw it for a dark page, leave out tables, which figures have.
DRAWING = {name: Parameter("flag", default=False) for name in ("figure", "dark", "brief")}
PANELS: dict[str, Panel] = {
    "overview": Panel(_overview),
    "health": Panel(_health, _SITE),
    "norms": Panel(
        _norms, {**_SITE, **_START, "stop": Parameter("integer"), "bins": Parameter("integer", 240, 1, 2000)},
    ),
    "apart": Panel(_apart, _SITE),
    "dimensions": Panel(_dimensions, {**_SITE, "most": Parameter("integer", 24, 1, 1000)}),
    "dimension": Panel(_dimension, {**_LAYER, "dimension": Parameter("integer", 0)}),
    "sequence": Panel(_sequence, {**_LAYER, "sequence": Parameter("integer", 0), "by": _BY, **_DIMENSION, **_START}),
    "token": Panel(_token, {**_POSITION, **_CONTEXT}),
    "top": Panel(
        _top, {**_LAYER, **_DIMENSION, "k": Parameter("integer", 10, 1, 200), **_CONTEXT}
    ),
    "find": Panel(
        _find,
        {"text": Parameter("text", high=10_000), "id": Parameter("integer"), **_START,
         "most": Parameter("integer", 50, 1, 1000), **_CONTEXT},
    ),
    "lens": Panel(_lens, {**_POSITION, "k": Parameter("integer", 8, 1, 50)}),
}  # fmt: skip
