"""What there is to see, as plain data: terminal, notebook, JSON and page are all drawn from the same."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmcache.text import json_ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from plotly.graph_objects import Figure

__all__ = ["Name", "View", "written"]


class Name(str):
    """The name of a variable, which is written as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def written(view: Callable[..., View], *given: object, **named: object) -> str:
    """Write the Python that makes a view: its arguments behind the store, in order, then those that are no defaults."""
    usual = {name: parameter.default for name, parameter in inspect.signature(view).parameters.items()}
    more = [f"{name}={value!r}" for name, value in named.items() if value != usual[name]]
    return f"mmcache.view.{view.__name__}({', '.join(['store', *map(repr, given), *more])})"


@dataclass(frozen=True, eq=False)
class View:
    """Arrays and labels, and where they are from. In a notebook it shows its figure.

    Attributes:
        name: what kind of view it is: the function of `mmcache.view` that made it.
        title: what it shows, for people.
        python: the Python that makes it.
        data: numpy arrays, numbers, texts, lists and dicts, by name; the function that made it says which.
        sampled: None where everything was looked at; else what part of it was.
        bytes_read: of activations and statistics, as they lie in the files.
    """

    name: str
    title: str
    python: str
    data: dict[str, Any]
    sampled: str | None = None
    bytes_read: int = 0

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __repr__(self) -> str:
        return f"View({self.title!r}, {', '.join(self.data)}{', sampled' if self.sampled else ''})"

    def to_json(self) -> dict[str, Any]:
        """Give all of it as what JSON can say; NaN and infinities as "NaN", "Infinity" and "-Infinity"."""
        about = {"view": self.name, "title": self.title, "python": self.python, "sampled": self.sampled}
        ready: dict[str, Any] = json_ready({**about, "bytes_read": self.bytes_read, "data": self.data})
        return ready

    def figure(self, *, dark: bool = False) -> Figure:
        """Draw it with plotly.

        Raises:
            ImportError: plotly is not installed: `pip install 'mmcache[view]'`.
        """
        from mmcache.view.figures import draw  # noqa: PLC0415 -- an extra, and slow to import

        return draw(self, dark=dark)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        try:
            figure = self.figure()
        except ImportError:
            return {"text/plain": repr(self)}
        bundle: dict[str, Any] = figure._repr_mimebundle_(include, exclude)
        return {"text/plain": repr(self), **bundle}
