"""Peers' ways to read random tokens, all layers of all sites, as their users write them: a Dataset in a DataLoader.

If a format has no bfloat16, the same bits are stored as int16, which costs it nothing, or float16.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

__all__ = ["LOADERS", "Loader", "batches_of"]


_WORKERS = 2


@dataclass(frozen=True)
class Loader:
    """One peer: how it stores `{site: [n, n_layers, d_model]}` in a folder, and reads a list of tokens from there."""

    name: str
    package: str
    how: str
    write: Callable[[Path, Mapping[str, torch.Tensor]], object]
    open: Callable[[Path], Any]
    read: Callable[[Any, list[int]], Any]


class _Tokens(Dataset[Any]):
    """Opens the files in each worker, since handles cannot be shared, and reads a batch at a time."""

    def __init__(self, loader: Loader, folder: Path) -> None:
        self._loader, self._folder = loader, folder
        self._opened: Any = None

    def __getitem__(self, tokens: list[int]) -> Any:
        if self._opened is None:
            self._opened = self._loader.open(self._folder)
        return self._loader.read(self._opened, tokens) if tokens else ()


def batches_of(loader: Loader, folder: Path, tokens: int, batch: int, most: float) -> float:
    """Load random batches with two workers for `most` seconds at most: tokens/s, from when the workers are ready."""
    # Empty batches make each worker start up, import and open the files. Leaving out a real first batch would favour
    # loaders that read ahead: on a small file they would have most of it in memory.
    sampler: list[list[int]] = [[]] * _WORKERS + list(BatchSampler(RandomSampler(range(tokens)), batch, drop_last=True))
    # Not forked from this process: some formats' threads do not survive a fork. The server preloads the slow imports.
    multiprocessing.set_forkserver_preload(["torch.utils.data", "mmcache", "mmcache.cli"])
    feed = DataLoader(
        _Tokens(loader, folder),
        sampler=sampler,
        batch_size=None,
        num_workers=_WORKERS,
        multiprocessing_context="forkserver",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about forks beside threads, and the formats' own warnings
        batches = iter(feed)
        for _ in range(_WORKERS):
            next(batches)
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < most:
            if next(batches, None) is None:
                break
            done += batch
        taken = time.perf_counter() - began
        # Workers end with their iterator.
        del batches
    return max(done, 1) / taken


def _bits(rows: torch.Tensor) -> np.ndarray:
    found: np.ndarray = rows.view(torch.int16).numpy()
    return found


def _write_npy(folder: Path, values: Mapping[str, torch.Tensor]) -> None:
    for site, rows in values.items():
        np.save(folder / f"{site}.npy", _bits(rows))


def _open_npy(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}


def _read_arrays(arrays: Mapping[str, Any], tokens: list[int]) -> dict[str, torch.Tensor]:
    return {site: torch.from_numpy(np.asarray(rows[tokens])) for site, rows in arrays.items()}


def _write_safetensors(folder: Path, values: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 -- as all peers, only where it is measured

    for site, rows in values.items():
        save_file({"rows": rows}, folder / f"{site}.safetensors")


def _open_safetensors(folder: Path) -> dict[str, Any]:
    from safetensors import safe_open  # noqa: PLC0415

    opener: Any = safe_open
    return {path.stem: opener(path, "pt").get_slice("rows") for path in folder.glob("*.safetensors")}


def _read_slices(slices: Mapping[str, Any], tokens: list[int]) -> dict[str, torch.Tensor]:
    return {site: torch.stack([rows[token] for token in tokens]) for site, rows in slices.items()}


def _write_zarr(folder: Path, values: Mapping[str, torch.Tensor]) -> None:
    import zarr  # noqa: PLC0415

    for site, rows in values.items():
        made = zarr.create_array(
            folder / site, shape=rows.shape, dtype="int16", chunks=(32, *rows.shape[1:]), compressors=None
        )
        made[:] = _bits(rows)


def _open_zarr(folder: Path) -> dict[str, Any]:
    import zarr  # noqa: PLC0415

    return {path.name: zarr.open_array(path, mode="r").oindex for path in folder.iterdir()}


def _open_tensorstore(folder: Path) -> dict[str, Any]:
    import tensorstore  # noqa: PLC0415

    return {
        path.name: tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}, open=True, read=True
        ).result()
        for path in folder.iterdir()
    }


def _read_tensorstore(arrays: Mapping[str, Any], tokens: list[int]) -> dict[str, torch.Tensor]:
    asked = {site: rows[tokens].read() for site, rows in arrays.items()}
    return {site: torch.from_numpy(read.result()) for site, read in asked.items()}


def _write_hdf5(folder: Path, values: Mapping[str, torch.Tensor]) -> None:
    import h5py  # noqa: PLC0415

    with h5py.File(folder / "rows.h5", "w") as file:
        for site, rows in values.items():
            file.create_dataset(site, data=_bits(rows))


def _open_hdf5(folder: Path) -> Any:
    import h5py  # noqa: PLC0415

    return h5py.File(folder / "rows.h5", "r")


def _read_hdf5(file: Any, tokens: list[int]) -> dict[str, torch.Tensor]:
    # h5py needs ascending indices without duplicates.
    order, back = np.unique(tokens, return_inverse=True)
    return {site: torch.from_numpy(file[site][order][back]) for site in file}


def _write_tensordict(folder: Path, values: Mapping[str, torch.Tensor]) -> None:
    from tensordict import TensorDict  # noqa: PLC0415

    TensorDict(dict(values), batch_size=[len(next(iter(values.values())))]).memmap(folder)


def _open_tensordict(folder: Path) -> Any:
    from tensordict import TensorDict  # noqa: PLC0415

    return TensorDict.load_memmap(folder)


def _read_tensordict(rows: Any, tokens: list[int]) -> dict[str, torch.Tensor]:
    return dict(rows[tokens].items())


def _write_arrow(folder: Path, values: Mapping[str, torch.Tensor]) -> None:
    from datasets import Array2D, Dataset, Features  # noqa: PLC0415

    shape = next(iter(values.values())).shape[1:]
    features = Features({site: Array2D(tuple(shape), "float16") for site in values})
    total = len(next(iter(values.values())))

    def rows(start: int) -> dict[str, np.ndarray]:
        return {site: some[start : start + 256].half().numpy() for site, some in values.items()}

    parts = [Dataset.from_dict(rows(start), features=features) for start in range(0, total, 256)]
    from datasets import concatenate_datasets, disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    concatenate_datasets(parts).save_to_disk(folder)


def _open_arrow(folder: Path) -> Any:
    from datasets import load_from_disk  # noqa: PLC0415

    return load_from_disk(folder).with_format("torch")


def _read_arrow(rows: Any, tokens: list[int]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = rows[tokens]
    return found


LOADERS = (
    Loader("np.memmap", "numpy", "np.load(mmap_mode='r')[tokens], 2 workers", _write_npy, _open_npy, _read_arrays),
    Loader("safetensors", "safetensors", "get_slice, a token at a time, 2 workers", _write_safetensors,
           _open_safetensors, _read_slices),
    Loader("zarr-python", "zarr", "oindex[tokens], chunks of 32 tokens, uncompressed, 2 workers", _write_zarr,
           _open_zarr, _read_arrays),
    Loader("tensorstore", "tensorstore", "zarr3[tokens].read(), chunks of 32 tokens, uncompressed, 2 workers",
           _write_zarr, _open_tensorstore, _read_tensorstore),
    Loader("HDF5", "h5py", "contiguous dataset[sorted tokens], 2 workers", _write_hdf5, _open_hdf5, _read_hdf5),
    Loader("tensordict", "tensordict", "load_memmap(folder)[tokens], 2 workers", _write_tensordict, _open_tensordict,
           _read_tensordict),
    Loader("Hugging Face datasets", "datasets", "Arrow with_format('torch')[tokens], float16, 2 workers", _write_arrow,
           _open_arrow, _read_arrow),
)  # fmt: skip
