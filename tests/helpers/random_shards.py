"""Shards of any layout, and rows of any bit patterns."""

import numpy as np
from hypothesis import strategies as st

from mmcache.format.dtypes import ACTIVATION_DTYPES, BY_NAME
from mmcache.format.shard import Layout, ShardSpec, encode
from mmcache.stats.moments import Moments

METADATA = {"format": "mmcache/1", "store": "0" * 32, "array": "mlp_in", "key": "c.0.0.0"}


@st.composite
def layouts(draw):
    """Any shard: both layouts, any width, full, partly filled or with absent inner chunks."""
    width, layers = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    chunk, chunks = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    row_shape = draw(st.sampled_from([(width,), (layers, width)]))
    dtype = BY_NAME[draw(st.sampled_from(ACTIVATION_DTYPES))]
    stat_layers = draw(st.sampled_from([0, layers if len(row_shape) == 2 else 1]))
    spec = ShardSpec("activations", dtype, row_shape, chunk * chunks, chunk, stat_layers)
    return Layout(spec, draw(st.integers(1, chunk * chunks)))


def random_rows(layout, seed=0):
    """Rows of any bit patterns: NaN payloads, infinities, -0.0 and subnormals among them."""
    shape = (layout.rows, *layout.spec.row_shape)
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, layout.spec.dtype.size), np.uint8)
    special = {2: [0x7C01, 0xFE55, 0x7C00, 0xFC00, 0x8000, 0x0001], 4: [0x7F800001, 0xFFC12345, 0x7F800000, 1 << 31, 1]}
    numbers = bits.view(f"<u{layout.spec.dtype.size}").reshape(-1)
    ours = special.get(layout.spec.dtype.size, [0x7FF0000000000001, 0x7FF0000000000000, 1 << 63, 1])[: numbers.size]
    numbers[: len(ours)] = ours
    return bits.view(layout.spec.dtype.numpy)[..., 0]


def encoded(layout, rows):
    spec, statistics = layout.spec, None
    if spec.stat_layers:
        moments = Moments(spec.stat_layers, spec.row_shape[-1], spec.chunk_rows)
        moments.add(rows.reshape(len(rows), spec.stat_layers, spec.row_shape[-1]))
        statistics = moments.arrays(0)
    return encode(spec, rows, METADATA, statistics), statistics
