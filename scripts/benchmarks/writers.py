"""Peers' ways to write layers to disk, as their users write them.

If a format has no bfloat16, the same bits are stored as int16; Hugging Face datasets gets float16.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["WRITERS", "Layers", "PeerWriter"]

Layers = list[torch.Tensor]


@dataclass(frozen=True)
class PeerWriter:
    """One peer: how it writes layers `[tokens, d_model]` bfloat16 into a folder; a `share` of them if slow."""

    name: str
    package: str
    how: str
    write: Callable[[Path, Layers], object]
    share: float = 1.0


def _bits(layer: torch.Tensor) -> np.ndarray:
    found: np.ndarray = layer.view(torch.int16).numpy()
    return found


def _shape(layers: Layers) -> tuple[int, int, int]:
    tokens, width = layers[0].shape
    return len(layers), tokens, width


def _memmap(folder: Path, layers: Layers) -> None:
    rows = np.memmap(folder / "rows", np.int16, "w+", shape=_shape(layers))
    for place, layer in enumerate(layers):
        rows[place] = _bits(layer)
    rows.flush()


def _torch_save(folder: Path, layers: Layers) -> None:
    for place, layer in enumerate(layers):
        torch.save(layer, folder / f"{place}.pt")


def _safetensors(folder: Path, layers: Layers) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 -- as all peers, only where it is measured

    for place, layer in enumerate(layers):
        save_file({"rows": layer}, folder / f"{place}.safetensors")


def _zarr(folder: Path, layers: Layers, *, tuned: bool, pipeline: str | None = None) -> None:
    import zarr  # noqa: PLC0415

    settings: Any = nullcontext()
    if pipeline is not None:
        import zarrs  # noqa: F401, PLC0415 -- registers its pipeline

        settings = zarr.config.set({"codec_pipeline.path": pipeline})
    options: dict[str, Any] = {}
    if tuned:
        rows = max(1, (16 << 20) // (layers[0].shape[1] * 2))
        options = {"chunks": (1, min(rows, len(layers[0])), layers[0].shape[1]), "compressors": None}
    with settings:
        made = zarr.create_array(folder / "rows", shape=_shape(layers), dtype="int16", **options)
        for place, layer in enumerate(layers):
            made[place] = _bits(layer)


def _tensorstore(folder: Path, layers: Layers) -> None:
    import tensorstore  # noqa: PLC0415

    rows = max(1, (16 << 20) // (layers[0].shape[1] * 2))
    made = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder / 'rows'}/"},
            "metadata": {
                "shape": list(_shape(layers)),
                "data_type": "int16",
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [1, min(rows, len(layers[0])), layers[0].shape[1]]},
                },
            },
        },
        create=True,
    ).result()
    written = [made[place].write(_bits(layer)) for place, layer in enumerate(layers)]
    for one in written:
        one.result()


def _hdf5(folder: Path, layers: Layers) -> None:
    import h5py  # noqa: PLC0415

    with h5py.File(folder / "rows.h5", "w") as file:
        rows = file.create_dataset("rows", _shape(layers), "int16")
        for place, layer in enumerate(layers):
            rows[place] = _bits(layer)


def _tensordict(folder: Path, layers: Layers) -> None:
    from tensordict import TensorDict  # noqa: PLC0415

    TensorDict({str(place): layer for place, layer in enumerate(layers)}).memmap(folder)


def _arrow(folder: Path, layers: Layers) -> None:
    from datasets import Array2D, Dataset, Features, disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    tokens = min(128, len(layers[0]))
    features = Features({"rows": Array2D((tokens, layers[0].shape[1]), "float16")})
    for place, layer in enumerate(layers):
        whole = layer[: len(layer) // tokens * tokens].half().numpy()
        made = Dataset.from_dict({"rows": whole.reshape(-1, tokens, whole.shape[1])}, features=features)
        made.save_to_disk(folder / str(place))


WRITERS = (
    PeerWriter("np.memmap", "numpy", "rows[layer] = …, flush()", _memmap),
    PeerWriter("torch.save", "torch", "a file a layer", _torch_save),
    PeerWriter("safetensors", "safetensors", "save_file, a file a layer", _safetensors),
    PeerWriter("zarr-python", "zarr", "as it comes", lambda folder, layers: _zarr(folder, layers, tuned=False), 0.25),
    PeerWriter("zarr-python, tuned", "zarr", "chunks of 16 MiB, uncompressed",
               lambda folder, layers: _zarr(folder, layers, tuned=True)),
    PeerWriter("zarrs pipeline", "zarrs", "zarr-python with ZarrsCodecPipeline, chunks of 16 MiB, uncompressed",
               lambda folder, layers: _zarr(folder, layers, tuned=True, pipeline="zarrs.ZarrsCodecPipeline")),
    PeerWriter("tensorstore", "tensorstore", "zarr3, chunks of 16 MiB, uncompressed, all writes at once", _tensorstore),
    PeerWriter("HDF5", "h5py", "contiguous dataset, rows[layer] = …", _hdf5),
    PeerWriter("tensordict", "tensordict", "TensorDict.memmap(folder)", _tensordict),
    PeerWriter("Hugging Face datasets", "datasets", "Array2D float16 of 128 tokens, save_to_disk", _arrow, 0.0625),
)  # fmt: skip
