"""The dtypes that can be stored, with their names in torch, zarr and safetensors; bfloat16 for zarr-python."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeGuard, cast

import ml_dtypes
import numpy as np
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.dtype import Float32, ZDType, data_type_registry

from mmcache.errors import DtypeError
from mmcache.system.arguments import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from zarr.core.common import JSON, ZarrFormat
    from zarr.core.dtype.common import DTypeJSON

__all__ = ["ACTIVATION_DTYPES", "BY_NAME", "BFloat16", "Dtype", "activation_dtype", "register_bfloat16"]


@dataclass(frozen=True)
class Dtype:
    """One storable dtype under all of its names; `fill` is the bytes of the fill value."""

    name: str
    safetensors: str
    numpy: np.dtype[np.generic]
    fill: bytes

    @cached_property
    def torch(self) -> torch.dtype:
        """The torch dtype; imports torch, which is slow and not needed to describe a store."""
        import torch  # noqa: PLC0415 -- most of a second

        found: torch.dtype = getattr(torch, self.name)
        return found

    @property
    def size(self) -> int:
        """Bytes an element."""
        return self.numpy.itemsize


def _dtype(name: str, code: str, numpy_dtype: object, fill: bytes) -> Dtype:
    return Dtype(name, code, np.dtype(numpy_dtype), fill)  # type: ignore[call-overload]


# The fill is the element's little-endian bytes: the quiet NaN for activations, so that missing rows cannot be
# mistaken for zeros; -1 ("unknown") for token ids and sequence bounds.
BY_NAME: Mapping[str, Dtype] = {
    entry.name: entry
    for entry in (
        _dtype("float32", "F32", "<f4", b"\x00\x00\xc0\x7f"),
        _dtype("float16", "F16", "<f2", b"\x00\x7e"),
        _dtype("bfloat16", "BF16", ml_dtypes.bfloat16, b"\xc0\x7f"),
        _dtype("float64", "F64", "<f8", b"\x00\x00\x00\x00\x00\x00\xf8\x7f"),
        _dtype("int32", "I32", "<i4", b"\xff" * 4),
        _dtype("int64", "I64", "<i8", b"\xff" * 8),
        _dtype("uint8", "U8", "u1", b"\x00"),
    )
}
ACTIVATION_DTYPES = ("float32", "float16", "bfloat16", "float64")


def activation_dtype(dtype: torch.dtype | str, *, what: str = "dtype") -> Dtype:
    """The dtype of that torch dtype or name, if activations can be stored in it.

    Args:
        dtype: for example `torch.bfloat16` or `"bfloat16"`.
        what: names the value in the error.

    Raises:
        DtypeError: anything but float32, float16, bfloat16 and float64.
    """
    said = dtype[:100] if isinstance(dtype, str) else shown(dtype)
    name = said if isinstance(dtype, str) else said.removeprefix("torch.")
    if name not in ACTIVATION_DTYPES:
        raise DtypeError(
            f"{what} is {said}, which cannot be stored as activations: expected one of "
            f"{', '.join(ACTIVATION_DTYPES)}; cast it first, or pass dtype= to store it as another"
        )
    return BY_NAME[name]


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType["np.dtype[ml_dtypes.bfloat16]", "ml_dtypes.bfloat16"], HasEndianness, HasItemSize):
    """bfloat16 for zarr-python, under its name in the zarr-extensions registry.

    Source: https://github.com/zarr-developers/zarr-extensions/tree/main/data-types/bfloat16. The fill value's JSON is
    the same as float32's, so zarr's Float32 converts it, except hexadecimal. Zarr format 3 only.
    """

    dtype_cls: ClassVar[type] = type(BY_NAME["bfloat16"].numpy)
    _zarr_v3_name: ClassVar[Literal["bfloat16"]] = "bfloat16"

    @property
    def item_size(self) -> int:
        """Bytes an element."""
        return 2

    @classmethod
    def from_native_dtype(cls, dtype: object) -> Self:
        """The zarr dtype for numpy's bfloat16 (the one that ml_dtypes registers)."""
        if dtype == BY_NAME["bfloat16"].numpy:
            return cls(endianness="little")
        raise DataTypeValidationError(f"expected ml_dtypes.bfloat16, found {dtype}")

    def to_native_dtype(self) -> np.dtype[ml_dtypes.bfloat16]:
        """The numpy dtype, which exists only in the machine's byte order."""
        if self.endianness == "big":
            raise DtypeError("a big-endian bfloat16 array cannot be opened: only little-endian is known")
        return cast("np.dtype[ml_dtypes.bfloat16]", BY_NAME["bfloat16"].numpy)

    @classmethod
    def _from_json_v2(cls, data: DTypeJSON) -> Self:
        raise DataTypeValidationError(f"bfloat16 exists in zarr format 3 only, found {data!r}")

    @classmethod
    def _from_json_v3(cls, data: DTypeJSON) -> Self:
        if data == cls._zarr_v3_name:
            return cls(endianness="little")
        raise DataTypeValidationError(f"expected {cls._zarr_v3_name!r}, found {data!r}")

    def to_json(self, zarr_format: ZarrFormat) -> Literal["bfloat16"]:  # type: ignore[override]
        """The name in `zarr.json`."""
        if zarr_format == 2:
            raise DtypeError("bfloat16 cannot be stored in zarr format 2: use zarr format 3")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> TypeGuard[ml_dtypes.bfloat16]:
        return isinstance(data, ml_dtypes.bfloat16) or Float32()._check_scalar(data)  # noqa: SLF001 -- zarr's own subclassing hook

    def cast_scalar(self, data: object) -> ml_dtypes.bfloat16:
        """Cast a Python or numpy number to a bfloat16 scalar."""
        if isinstance(data, ml_dtypes.bfloat16):
            return data
        return ml_dtypes.bfloat16(Float32().cast_scalar(data))

    def default_scalar(self) -> ml_dtypes.bfloat16:
        """Zero, as for every zarr number type."""
        return ml_dtypes.bfloat16(0)

    def from_json_scalar(self, data: JSON, *, zarr_format: ZarrFormat) -> ml_dtypes.bfloat16:
        """A fill value from JSON; hexadecimal digits are the number's bits."""
        if isinstance(data, str) and data.startswith("0x"):
            # Not zarr's conversion: it takes four digits for a float16, whatever the dtype.
            if len(data) != 6:
                raise ValueError(f"fill value {data!r} of a bfloat16 array: expected 4 hexadecimal digits")
            return cast("ml_dtypes.bfloat16", np.array(int(data, 16), np.uint16).view(ml_dtypes.bfloat16)[()])
        return ml_dtypes.bfloat16(Float32().from_json_scalar(data, zarr_format=zarr_format))

    def to_json_scalar(self, data: object, *, zarr_format: ZarrFormat) -> JSON:
        """A fill value as JSON."""
        value = float(cast("float", data))
        return cast("JSON", Float32().to_json_scalar(value, zarr_format=zarr_format))


def register_bfloat16() -> None:
    """Make zarr-python read and write bfloat16 arrays, unless this zarr already knows the name."""
    if "bfloat16" not in data_type_registry.contents:
        data_type_registry.register("bfloat16", BFloat16)
