"""The tokens at which a dimension or a direction is largest, and some from further down, each in its context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.read.store import a_store
from mmcache.system.arguments import a_name, an_index, count, optional, public
from mmcache.view.base import View, written
from mmcache.view.direction import named, resolve_direction
from mmcache.view.look import BUDGET, Look
from mmcache.view.words import Words, a_words, surroundings

if TYPE_CHECKING:
    from mmcache.read.store import Store
    from mmcache.view.direction import Direction

__all__ = ["top"]

# From which part of the values on each band is; the first is the very top.
_BANDS = (("top", 1.0, 1.0), ("99 to 100 %", 0.99, 1.0), ("90 to 99 %", 0.9, 0.99), ("50 to 90 %", 0.5, 0.9),
          ("0 to 50 %", 0.0, 0.5))  # fmt: skip


@public(
    store=a_store, site=a_name, layer=an_index, k=count(1), context=count(0), budget=count(1), words=optional(a_words)
)
def top(
    store: Store,
    site: str,
    layer: int,
    direction: Direction,
    *,
    k: int = 10,
    context: int = 12,
    budget: int = BUDGET,
    words: Words | None = None,
) -> View:
    """Find the tokens with the largest values of a dimension or direction, and examples from each band of quantiles.

    Looked at are the tokens that count in the statistics (not BOS, special or first), as many as `budget` bytes hold.
    Examples of a band are evenly spread over it, by rank, so that nothing is picked by hand.

    Args:
        store: the store.
        site: one of its sites.
        layer: the model's number.
        direction: a dimension's number, or a vector `[d_model]` of which the dot product is taken.
        k: examples at the top, and in each band.
        context: tokens before and behind each.
        budget: bytes of activations that may be read.
        words: the store's tokens as text, if it was read already.

    `data`: `looked`, how many values there are; `non_finite`, how many of them are left out; `bands`, each with `name`,
    `low`, `high` (values), `tokens` (how many are in it) and `examples`: `position`, `sequence`, `offset`, `token`,
    `value`, `before`, `text`, `after`, the largest first, of equal ones the earlier.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as reading does.
        ShapeError: the direction does not fit.
        ArgumentError: `k` below 1, `context` below 0.
    """
    look = Look(store, site, [layer], budget)
    resolved = resolve_direction(look, direction)
    sample = look.sample()
    values = look.scores(sample.positions, resolved)[:, 0]
    finite = np.isfinite(values)
    positions, values = sample.positions[finite], values[finite]
    order = np.argsort(-values, kind="stable")
    words = words or Words(store)
    bands = [_band(look, words, name, positions[ranks], values[ranks], shown, context)
             for name, ranks, shown in _bands(order, k)]  # fmt: skip
    what = f"dimension {resolved}" if isinstance(resolved, int) else "the direction"
    data = {
        "site": site, "layer": layer, "dimension": resolved if isinstance(resolved, int) else None,
        "looked": len(finite), "non_finite": int((~finite).sum()), "bands": bands,
    }  # fmt: skip
    return View(
        "top",
        f"Tokens by {what} of {site}, layer {layer}",
        written(top, site, layer, named(resolved), k=k, context=context, budget=budget),
        data,
        sample.said,
        look.bytes_read,
    )


def _bands(order: np.ndarray, k: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Cut a ranking into bands: name, the ranks in it, and which of those are shown."""
    found = []
    n = len(order)
    for name, low, high in _BANDS:
        # Ranks count from the largest.
        first, last = (0, min(k, n)) if low == high else (n - int(np.ceil(high * n)), n - int(np.ceil(low * n)))
        ranks = order[first:last]
        shown = (
            np.unique(np.linspace(0, len(ranks) - 1, min(k, len(ranks))).astype(int))
            if len(ranks)
            else np.empty(0, int)
        )
        found.append((name, ranks, shown))
    return found


def _band(
    look: Look, words: Words, name: str, positions: np.ndarray, values: np.ndarray, shown: np.ndarray, context: int
) -> dict[str, Any]:
    examples = []
    for at in shown:
        position = int(positions[at])
        place = look.store.locate(position)
        examples.append(
            {
                "position": position,
                "sequence": place.sequence,
                "offset": place.offset,
                "token": place.token_id,
                "value": float(values[at]),
                **surroundings(look.store, position, context, words),
            }
        )
    edges = [float(values.min()), float(values.max())] if len(values) else [float("nan")] * 2
    return {"name": name, "low": edges[0], "high": edges[1], "tokens": len(values), "examples": examples}
