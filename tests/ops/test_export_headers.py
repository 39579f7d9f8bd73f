"""Headers of other formats: what their own readers make of them."""

import io
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from mmcache.ops.export import npy_header, safetensors_header

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1}
shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3)


@given(
    given=st.dictionaries(st.text("abc.é", min_size=1, max_size=8), st.tuples(st.sampled_from(sorted(SIZES)), shapes)),
    metadata=st.dictionaries(st.text(max_size=2000), st.text(max_size=2000), max_size=3),
)
def test_safetensors_reads_what_follows_the_header(given, metadata):
    data = {
        name: np.random.default_rng(1).bytes(math.prod(shape) * SIZES[code]) for name, (code, shape) in given.items()
    }
    head = safetensors_header({name: (*given[name], len(data[name])) for name in given}, metadata)
    assert head.dtype == np.uint8
    assert len(head) % 4096 == 0
    found = dict(deserialize(head.tobytes() + b"".join(data.values())))
    assert set(found) == set(given)
    for name, (code, shape) in given.items():
        assert (found[name]["dtype"], found[name]["shape"]) == (code, shape)
        assert bytes(found[name]["data"]) == data[name]


@given(code=st.sampled_from(["<f8", "<f4", "<f2", "<u2", "<i4", "<i8", "|u1"]), shape=shapes)
def test_numpy_reads_what_follows_the_header(code, shape):
    data = np.random.default_rng(1).bytes(math.prod(shape) * np.dtype(code).itemsize)
    found = np.load(io.BytesIO(npy_header(code, tuple(shape)).tobytes() + data))
    assert (found.dtype.str, found.shape, found.tobytes()) == (code, tuple(shape), data)
