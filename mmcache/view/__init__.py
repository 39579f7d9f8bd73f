"""Look into a store: each view is a function that returns arrays and labels, and reads a bounded number of bytes.

    store = mmcache.open("acts")
    mmcache.view.health(store, "mlp_out")["problems"]
    mmcache.view.norms(store, "mlp_out")              # in a notebook: the map
    mmcache.view.top(store, "mlp_out", 3, 17)["bands"][0]["examples"]

The terminal, notebooks, JSON and the page all show the same data. `sampled` says what a view left out.
"""

from mmcache.read.describe import overview
from mmcache.text import json_ready
from mmcache.view.base import View
from mmcache.view.dimensions import dimension, dimensions, load_direction
from mmcache.view.health import health
from mmcache.view.lens import Unembedding, lens
from mmcache.view.norms import apart, norms
from mmcache.view.search import find, top
from mmcache.view.summary import layer_view, row_view, statistics_view
from mmcache.view.tokens import Detokenizer, sequence, token

# The old name, which users' code may import.
Words = Detokenizer

__all__ = [
    "Detokenizer",
    "Unembedding",
    "View",
    "apart",
    "dimension",
    "dimensions",
    "find",
    "health",
    "json_ready",
    "layer_view",
    "lens",
    "load_direction",
    "norms",
    "overview",
    "row_view",
    "sequence",
    "statistics_view",
    "token",
    "top",
]
