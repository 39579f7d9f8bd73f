import json

import ml_dtypes
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype
from zarr.core.dtype.common import DataTypeValidationError
from zarr.dtype import data_type_registry
from zarr.storage import MemoryStore

from mmcache.errors import DtypeError
from mmcache.format.dtypes import ACTIVATION_DTYPES, BY_NAME, BFloat16, activation_dtype, register_bfloat16

register_bfloat16()
BITS = st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=40)


def bfloat16_array(bits, **options):
    """A zarr array in memory whose first numbers have these bits, and one chunk behind them that has none."""
    store = MemoryStore()
    array = zarr.create_array(
        store, shape=(len(bits) + 8,), chunks=(4,), dtype=ml_dtypes.bfloat16, compressors=None, **options
    )
    array[: len(bits)] = np.array(bits, np.uint16).view(ml_dtypes.bfloat16)
    return store, array


def metadata_of(store):
    return json.loads(store._store_dict["zarr.json"].to_bytes())


def put_metadata(store, said):
    store._store_dict["zarr.json"] = default_buffer_prototype().buffer.from_bytes(json.dumps(said).encode())


@pytest.mark.parametrize("entry", BY_NAME.values(), ids=BY_NAME)
def test_every_name_means_the_same_numbers(entry):
    assert entry.size == entry.numpy.itemsize == entry.torch.itemsize == len(entry.fill)
    assert entry.numpy.name == entry.name == str(entry.torch).removeprefix("torch.")
    bits = np.random.default_rng(0).integers(0, 256, 64 * entry.size, np.uint8)
    by_torch = torch.from_numpy(bits.copy()).view(entry.torch).tolist()
    with np.errstate(invalid="ignore"):  # some are signalling NaNs
        by_numpy = bits.view(entry.numpy).astype(np.float64)
    assert np.array_equal(by_numpy, np.array(by_torch, np.float64), equal_nan=True)


@pytest.mark.parametrize("name", ACTIVATION_DTYPES)
def test_rows_that_are_not_there_are_the_quiet_nan(name):
    entry = BY_NAME[name]
    fill = torch.tensor(list(entry.fill), dtype=torch.uint8).view(entry.torch)
    assert fill.isnan().all()
    # Bit for bit the NaN that the zarr specification gives the name "NaN".
    assert torch.equal(fill.view(torch.uint8), torch.tensor([float("nan")], dtype=entry.torch).view(torch.uint8))


@pytest.mark.parametrize("name", ACTIVATION_DTYPES)
def test_activation_dtypes_go_by_either_name(name):
    assert activation_dtype(name) is activation_dtype(BY_NAME[name].torch) is BY_NAME[name]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.complex64, "int64", "float8", "bf16", ""])
def test_other_dtypes_are_refused_with_those_that_can_be_stored(dtype):
    with pytest.raises(DtypeError, match=r"layer 3 is .* expected one of float32, float16, bfloat16, float64; cast"):
        activation_dtype(dtype, what="layer 3")


@given(BITS)
def test_zarr_writes_and_reads_bfloat16_bit_for_bit(bits):
    store, array = bfloat16_array(bits, fill_value=float("nan"))
    expected = np.concatenate([np.array(bits, np.uint16), np.full(8, 0x7FC0, np.uint16)])
    for opened in (array, zarr.open_array(store, mode="r")):
        assert opened.dtype == ml_dtypes.bfloat16
        assert np.array_equal(opened[:].view(np.uint16), expected)
    stored = store._store_dict["c/0"].to_bytes()
    assert stored == expected[:4].astype("<u2").tobytes()


def test_the_metadata_survives_being_read_and_written():
    store, array = bfloat16_array([0x3F80], fill_value=float("nan"))
    said = metadata_of(store)
    assert (said["data_type"], said["fill_value"]) == ("bfloat16", "NaN")
    assert zarr.open_array(store).metadata.to_dict() == array.metadata.to_dict()
    # zarr writes it anew when attributes change.
    zarr.open_array(store).update_attributes({"x": 1})
    assert metadata_of(store) == said | {"attributes": {"x": 1}}


@pytest.mark.parametrize(
    ("fill", "bits"),
    [
        ("NaN", 0x7FC0),
        ("Infinity", 0x7F80),
        ("-Infinity", 0xFF80),
        (-0.0, 0x8000),
        (1, 0x3F80),
        ("0x3f80", 0x3F80),
        ("0x0001", 0x0001),
        ("0xffc1", 0xFFC1),
    ],
)
def test_fill_values_of_other_writers_are_read_by_their_bits(fill, bits):
    store, _ = bfloat16_array([0], fill_value=0)
    put_metadata(store, metadata_of(store) | {"fill_value": fill})
    assert zarr.open_array(store)[-1:].view(np.uint16).tolist() == [bits]


@pytest.mark.parametrize("fill", ["0x3f800000", "0x3f8", "0xzzzz", "many", None, [1]])
def test_fill_values_that_are_no_bfloat16_are_refused(fill):
    with pytest.raises((ValueError, TypeError)):
        BFloat16(endianness="little").from_json_scalar(fill, zarr_format=3)


def test_bfloat16_is_zarr_format_3_only():
    with pytest.raises(DtypeError, match="zarr format 3"):
        zarr.create_array(MemoryStore(), shape=(4,), chunks=(2,), dtype=ml_dtypes.bfloat16, zarr_format=2)
    with pytest.raises(DataTypeValidationError, match="zarr format 3 only"):
        BFloat16.from_json({"name": "bfloat16", "object_codec_id": None}, zarr_format=2)


@pytest.mark.parametrize("data", ["float32", "bfloat17", {"name": "bfloat16", "configuration": {}}, 16, None])
def test_other_data_types_are_not_taken_for_bfloat16(data):
    with pytest.raises(DataTypeValidationError, match="expected 'bfloat16'"):
        BFloat16.from_json(data, zarr_format=3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint16])
def test_other_numpy_dtypes_are_not_taken_for_bfloat16(dtype):
    with pytest.raises(DataTypeValidationError, match="bfloat16"):
        BFloat16.from_native_dtype(np.dtype(dtype))


def test_big_endian_bytes_are_refused_and_not_read_as_other_numbers():
    store, _ = bfloat16_array([0x3F80], fill_value=0)
    said = metadata_of(store)
    said["codecs"][0]["configuration"]["endian"] = "big"
    put_metadata(store, said)
    with pytest.raises(DtypeError, match="only little-endian"):
        zarr.open_array(store)[:]


def test_a_zarr_that_knows_bfloat16_keeps_its_own(monkeypatch):
    monkeypatch.setitem(data_type_registry.contents, "bfloat16", object)
    register_bfloat16()
    assert data_type_registry.contents["bfloat16"] is object
